"""The norm theorems on the layers people run: autograd against the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from preln.base.errors import MissingExtraError, require
from preln.testing.cases import cases
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import BRIDGING, Property, Worst
from preln.theory import Evidence

NAMES = {
    "rms_norm": "torch.nn.functional.rms_norm",
    "layer_norm": "torch.nn.functional.layer_norm",
    "rms_norm_outside": "x/(sqrt(ms) + eps) in torch",
}


def denominator(layer: NormLayer, x: Tensor) -> Tensor:
    """Return the layer's s, from its definition."""
    if layer.kind == "layer_norm":
        return (x.var(-1, correction=0) + layer.eps).sqrt()
    square = x.square().mean(-1)
    return square.sqrt() + layer.eps if layer.kind == "rms_norm_outside" else (square + layer.eps).sqrt()


def _unit(layer: NormLayer, x: Tensor) -> Tensor:
    """Return |gamma|_(1)/s, the size that errors are measured by; 1/s where the gain is zero."""
    top = 1.0 if layer.weight is None else float(layer.weight.abs().max()) or 1.0
    return top / denominator(layer, x)


def _each(
    kind: str, rounds: int, *, gained: bool, seed: int
) -> Iterator[tuple[NormLayer, Tensor, Tensor, Tensor]]:
    for layer, x in cases(kind, seed=seed, rounds=rounds, gained=gained):
        yield layer, x, autograd_jacobian(layer, x), _unit(layer, x)


def _jacobian(kind: str, rounds: int) -> list[Evidence]:
    worst = Worst(f"autograd of {NAMES[kind]} in float64 against the closed form, with and without gain")
    for gained in (False, True):
        for layer, x, actual, unit in _each(kind, rounds, gained=gained, seed=1):
            errors = (actual - layer.jacobian(x)).abs().amax((-2, -1)) / unit
            worst.update(errors, x, eps=layer.eps, weight=layer.weight)
    return [worst.evidence(), *_bridge(kind, rounds)]


def _bridge(kind: str, rounds: int) -> list[Evidence]:
    """Compare a module of transformers, which computes in float32, with the closed form in float64."""
    try:
        modeling = require("transformers.models.llama.modeling_llama", extra="all")
    except MissingExtraError:
        return []
    modules = {
        "rms_norm": (modeling.LlamaRMSNorm, "LlamaRMSNorm"),
        "layer_norm": (torch.nn.LayerNorm, "LayerNorm"),
    }
    make, name = modules[kind]
    worst = Worst(f"autograd of {name} in float32 against the closed form", BRIDGING)
    generator = torch.Generator().manual_seed(2)
    for d in (2, 8, 32) * rounds:
        module = make(d, eps=1e-5)
        weight = 1 + 0.3 * torch.randn(d, generator=generator)
        module.weight.data = weight
        x = torch.randn(8, d, generator=generator) * torch.tensor([1e-3, 1.0, 30.0, 1e4] * 2)[:, None]
        layer = NormLayer(kind, 1e-5, weight.double())
        errors = (autograd_jacobian(module, x).double() - layer.jacobian(x.double())).abs().amax((-2, -1))
        worst.update(errors / _unit(layer, x.double()), x, eps=1e-5, weight=weight)
    return [worst.evidence()]


def _spectrum(kind: str, rounds: int) -> list[Evidence]:
    worst = Worst(f"dense SVD of autograd's Jacobian of {NAMES[kind]} against all singular values")
    for layer, x, actual, unit in _each(kind, rounds, gained=False, seed=3):
        values = torch.linalg.svdvals(actual / unit[:, None, None])
        errors = (values - layer.singular_values(x) / unit[:, None]).abs().amax(-1)
        worst.update(errors, x, eps=layer.eps)
    return [worst.evidence()]


def _norm(kind: str, rounds: int) -> list[Evidence]:
    """Sigma = 1/s where the dimension allows it, smaller by the stated amount elsewhere."""
    worst = Worst(f"largest singular value of autograd's Jacobian of {NAMES[kind]} against the theorem")
    full = 3 if kind == "layer_norm" else 2
    for layer, x, actual, unit in _each(kind, rounds, gained=False, seed=4):
        d = x.shape[-1]
        flat = (x == x[:, :1]).all(-1) if kind == "layer_norm" else (x == 0).all(-1)
        ratio = layer.eps * unit if kind == "rms_norm_outside" else layer.eps * unit.square()
        small = (
            torch.zeros_like(unit)
            if kind == "layer_norm" and d == 1
            else torch.where(flat, unit, ratio * unit)
        )
        expected = unit if d >= full else small
        worst.update((dense_sigma(actual) - expected).abs() / unit, x, eps=layer.eps)
    return [worst.evidence()]


def _gain(kind: str, rounds: int) -> list[Evidence]:
    bounds = Worst(
        f"the bounds against the dense sigma of {NAMES[kind]} with gain: share by which they are broken"
    )
    exact = Worst(f"the secular equation's sigma against the dense sigma of {NAMES[kind]} with gain")
    for layer, x, actual, unit in _each(kind, rounds, gained=True, seed=5):
        sigma = dense_sigma(actual)
        lower, upper = layer.bounds(x)
        where = {"eps": layer.eps, "weight": layer.weight}
        bounds.update(torch.maximum(lower - sigma, sigma - upper).clamp(min=0) / unit, x, **where)
        exact.update((layer.sigma(x) - sigma).abs() / unit, x, **where)
    return [bounds.evidence(), exact.evidence()]


def rms_jac(rounds: int) -> list[Evidence]:
    """Check the Jacobian of RMSNorm."""
    return _jacobian("rms_norm", rounds)


def ln_jac(rounds: int) -> list[Evidence]:
    """Check the Jacobian of LayerNorm."""
    return _jacobian("layer_norm", rounds)


def rms_spec(rounds: int) -> list[Evidence]:
    """Check the spectrum of RMSNorm's Jacobian."""
    return _spectrum("rms_norm", rounds)


def ln_spec(rounds: int) -> list[Evidence]:
    """Check the spectrum of LayerNorm's Jacobian."""
    return _spectrum("layer_norm", rounds)


def rms_norm(rounds: int) -> list[Evidence]:
    """Check sigma of RMSNorm."""
    return _norm("rms_norm", rounds)


def rms_paper(rounds: int) -> list[Evidence]:
    """Check sigma with eps outside the root."""
    return _norm("rms_norm_outside", rounds)


def ln_norm_d3(rounds: int) -> list[Evidence]:
    """Check sigma of LayerNorm."""
    return _norm("layer_norm", rounds)


def rms_gain_bound(rounds: int) -> list[Evidence]:
    """Check bounds and exact sigma of RMSNorm with gain, both places of eps."""
    return [*_gain("rms_norm", rounds), *_gain("rms_norm_outside", rounds)]


def ln_gain_bound(rounds: int) -> list[Evidence]:
    """Check bounds and exact sigma of LayerNorm with gain."""
    return _gain("layer_norm", rounds)


PROPERTIES: dict[str, Property] = {
    "RMS-JAC": rms_jac,
    "LN-JAC": ln_jac,
    "RMS-SPEC": rms_spec,
    "LN-SPEC": ln_spec,
    "RMS-NORM": rms_norm,
    "RMS-PAPER": rms_paper,
    "LN-NORM-D3": ln_norm_d3,
    "RMS-GAIN-BOUND": rms_gain_bound,
    "LN-GAIN-BOUND": ln_gain_bound,
}
