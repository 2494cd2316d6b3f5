"""The optimizer that the settings name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from preln.base.errors import MissingExtraError
from preln.heal.options.settings import TrainingSettings
from preln.heal.preparing.quantise import quietly


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainingSettings
) -> tuple[torch.optim.Optimizer, list[str]]:
    """AdamW, or AdamW of bitsandbytes whose moments are stored in 8 bits, and what there is to say about it.

    ``paged_adamw_8bit`` moves its moments to the CPU's memory where the GPU's is full (Dettmers et al. 2023).
    On the CPU there is nothing to page, so its moments are in 8 bits only; those of tensors of fewer than
    4,096 numbers keep 32 bits. Without bitsandbytes it is torch's AdamW.

    Args:
        parameters: What trains.
        settings: Learning rate, weight decay and the optimizer's name; betas are 0.9 and 0.999, eps 1e-8.

    Returns:
        The optimizer, and notes for the manifest and the card.
    """
    weights = list(parameters)
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    # one pass over the memory instead of several: three times as fast on the CPU
    fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, fused=fused, **options), []
    try:
        optimizers = quietly("bitsandbytes").optim
    except MissingExtraError:
        note = "paged_adamw_8bit: bitsandbytes is not installed: torch's AdamW was used"
        return torch.optim.AdamW(weights, fused=fused, **options), [note]
    if all(weight.device.type == "cuda" for weight in weights):
        return optimizers.PagedAdamW8bit(weights, **options), []
    note = "paged_adamw_8bit: nothing is paged on this device: the moments were in 8 bits only"
    return optimizers.AdamW8bit(weights, **options), [note]
