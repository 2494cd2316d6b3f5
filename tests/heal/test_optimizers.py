from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from preln.heal import TrainingSettings
from preln.heal.training.optimizers import make_optimizer

EIGHT = {"steps": 5, "learning_rate": 1e-2, "weight_decay": 0.1, "optimizer": "paged_adamw_8bit"}


def trained(settings: TrainingSettings, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A weight before and after five updates with fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(size, generator=generator))
    start = weight.detach().clone()
    optimizer, notes = make_optimizer([weight], settings)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        weight.grad = torch.randn(size, generator=generator)
        optimizer.step()
    return start, weight.detach(), notes


def by_hand(settings: TrainingSettings, size: int) -> torch.Tensor:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) written out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(5):
        g = torch.randn(size, generator=generator).double()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        weight = weight - settings.rate(step) * (m / (v.sqrt() + 1e-8) + settings.weight_decay * weight)
    return weight.float()


def gap(settings: TrainingSettings, reference: TrainingSettings, size: int) -> float:
    start, found, _ = trained(settings, size)
    expected = by_hand(reference, size)
    return float((found - expected).norm() / (expected - start).norm())


def test_adamw_is_the_default() -> None:
    settings = TrainingSettings(**{**EIGHT, "optimizer": "adamw"})
    assert trained(settings, 10)[2] == []
    assert gap(settings, settings, 5000) < 1e-5


# below 4,096 numbers bitsandbytes keeps its moments in 32 bits
@pytest.mark.parametrize(("size", "error"), [(1000, 1e-5), (5000, 0.03)])
def test_moments_in_8_bits_are_adamw_up_to_rounding(size: int, error: float) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit moments need bitsandbytes")
    settings = TrainingSettings(**EIGHT)
    assert gap(settings, settings, size) < error
    assert gap(settings, settings.replaced(learning_rate=5e-3), size) > 0.1, "rates are told apart"
    (note,) = trained(settings, size)[2]
    assert note == "paged_adamw_8bit: nothing is paged on this device: the moments were in 8 bits only"
    if size > 4096:
        assert gap(settings, settings, size) > 1e-4, "eight bits leave a trace"


def test_without_bitsandbytes_it_is_adamw_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = TrainingSettings(**EIGHT)
    weight = nn.Parameter(torch.zeros(3))
    optimizer, notes = make_optimizer([weight], settings)
    assert type(optimizer) is torch.optim.AdamW
    assert notes == ["paged_adamw_8bit: bitsandbytes is not installed: torch's AdamW was used"]
