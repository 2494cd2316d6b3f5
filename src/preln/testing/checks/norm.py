"""The norm theorems on torch's own layers: autograd in float64 against the formulas, which may be mutated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from preln.testing.cases import cases
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import Worst
from preln.theory import Evidence

NAMES = {
    "rms_norm": "torch.nn.functional.rms_norm",
    "layer_norm": "torch.nn.functional.layer_norm",
    "rms_norm_outside": "x/(sqrt(ms) + eps) in torch",
}
Make = Callable[..., NormLayer]
"""(kind, eps, weight) -> layer: its call is the layer itself, its methods are the formulas under test."""
Check = Callable[..., list[Evidence]]
"""(rounds, make) -> evidence"""


def _unit(layer: NormLayer, x: Tensor) -> Tensor:
    """Return |gamma|_(1)/s, the size that errors are measured by; 1/s where the gain is zero."""
    top = 1.0 if layer.weight is None else float(layer.weight.abs().max()) or 1.0
    return top / layer.denominator(x)


def _each(
    kind: str, rounds: int, make: Make, *, gained: bool, seed: int
) -> Iterator[tuple[NormLayer, Tensor, Tensor, Tensor]]:
    for layer, x in cases(kind, seed=seed, rounds=rounds, gained=gained, make=make):
        yield layer, x, autograd_jacobian(layer, x), _unit(layer, x)


def jacobian(kind: str, rounds: int, make: Make = NormLayer) -> list[Evidence]:
    """Compare every entry, with and without gain."""
    worst = Worst(f"autograd of {NAMES[kind]} in float64 against the closed form, with and without gain")
    for gained in (False, True):
        for layer, x, actual, unit in _each(kind, rounds, make, gained=gained, seed=1):
            errors = (actual - layer.jacobian(x)).abs().amax((-2, -1)) / unit
            worst.update(errors, x, eps=layer.eps, weight=layer.weight)
    return [worst.evidence()]


def spectrum(kind: str, rounds: int, make: Make = NormLayer) -> list[Evidence]:
    """Compare all singular values, without gain."""
    worst = Worst(f"dense SVD of autograd's Jacobian of {NAMES[kind]} against all singular values")
    for layer, x, actual, unit in _each(kind, rounds, make, gained=False, seed=3):
        values = torch.linalg.svdvals(actual / unit[:, None, None])
        errors = (values - layer.singular_values(x) / unit[:, None]).abs().amax(-1)
        worst.update(errors, x, eps=layer.eps)
    return [worst.evidence()]


def norm(kind: str, rounds: int, make: Make = NormLayer) -> list[Evidence]:
    """Compare sigma without gain with the theorem, and with the closed form."""
    worst = Worst(f"largest singular value of autograd's Jacobian of {NAMES[kind]} against the theorem")
    formula = Worst("the closed form of sigma against the same singular value")
    full = 3 if kind == "layer_norm" else 2
    for layer, x, actual, unit in _each(kind, rounds, make, gained=False, seed=4):
        d = x.shape[-1]
        flat = (x == x[:, :1]).all(-1) if kind == "layer_norm" else (x == 0).all(-1)
        ratio = layer.eps * unit if kind == "rms_norm_outside" else layer.eps * unit.square()
        small = (
            torch.zeros_like(unit)
            if kind == "layer_norm" and d == 1
            else torch.where(flat, unit, ratio * unit)
        )
        sigma = dense_sigma(actual)
        worst.update((sigma - (unit if d >= full else small)).abs() / unit, x, eps=layer.eps)
        formula.update((sigma - layer.sigma(x)).abs() / unit, x, eps=layer.eps)
    return [worst.evidence(), formula.evidence()]


def bounds(kinds: tuple[str, ...], rounds: int, make: Make = NormLayer) -> list[Evidence]:
    """Check that sigma with a gain lies between its bounds, and reaches them where they meet."""
    found = []
    for kind in kinds:
        broken = Worst(
            f"the bounds against the dense sigma of {NAMES[kind]} with gain: share by which broken"
        )
        meeting = Worst("the same where the gains that make the bounds are equal: distance from them")
        for layer, x, actual, unit in _each(kind, rounds, make, gained=True, seed=5):
            sigma = dense_sigma(actual)
            lower, upper = layer.bounds(x)
            where = {"eps": layer.eps, "weight": layer.weight}
            broken.update(torch.maximum(lower - sigma, sigma - upper).clamp(min=0) / unit, x, **where)
            tied = lower == upper
            errors = torch.maximum((sigma - upper).abs(), (sigma - lower).abs()) / unit
            meeting.update(errors[tied], x[tied], **where)
        found += [broken.evidence(), meeting.evidence()]
    return found


def gain(kinds: tuple[str, ...], rounds: int, make: Make = NormLayer) -> list[Evidence]:
    """Compare sigma with a gain with the secular equation's root."""
    found = []
    for kind in kinds:
        exact = Worst(f"the secular equation's sigma against the dense sigma of {NAMES[kind]} with gain")
        for layer, x, actual, unit in _each(kind, rounds, make, gained=True, seed=5):
            errors = (layer.sigma(x) - dense_sigma(actual)).abs() / unit
            exact.update(errors, x, eps=layer.eps, weight=layer.weight)
        found.append(exact.evidence())
    return found


BOTH = ("rms_norm", "rms_norm_outside")
PROPERTIES: dict[str, Check] = {
    "RMS-JAC": partial(jacobian, "rms_norm"),
    "LN-JAC": partial(jacobian, "layer_norm"),
    "RMS-SPEC": partial(spectrum, "rms_norm"),
    "LN-SPEC": partial(spectrum, "layer_norm"),
    "RMS-NORM": partial(norm, "rms_norm"),
    "RMS-PAPER": partial(norm, "rms_norm_outside"),
    "LN-NORM-D3": partial(norm, "layer_norm"),
    "RMS-GAIN-BOUND": partial(bounds, BOTH),
    "LN-GAIN-BOUND": partial(bounds, ("layer_norm",)),
    "RMS-GAIN": partial(gain, BOTH),
    "LN-GAIN": partial(gain, ("layer_norm",)),
}
