"""The theorems that compare RMSNorm with LayerNorm, on numbers (CMP-*)."""

from __future__ import annotations

import torch
from torch import Tensor

from preln.testing.cases import cases
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import EXACT, Property, Worst
from preln.theory import Evidence

OUTSIDE = ("rms_norm_outside", "layer_norm")


def dense_norm_sigma(kind: str, x: Tensor, eps: float) -> Tensor:
    """Return the largest singular value of autograd's Jacobian of a norm without gain."""
    return dense_sigma(autograd_jacobian(NormLayer(kind, eps), x))


def cmp_same(rounds: int) -> list[Evidence]:
    """Compare dense sigmas of both layers at the same x and eps, d >= 3."""
    worst = Worst("dense sigma of rms_norm and layer_norm: share by which the first exceeds the second")
    for layer, x in cases("layer_norm", seed=6, rounds=rounds, gained=False, dimensions=(3, 4, 9, 16)):
        rms, ln = dense_norm_sigma("rms_norm", x, layer.eps), dense_norm_sigma("layer_norm", x, layer.eps)
        worst.update((rms / ln - 1).clamp(min=0), x, eps=layer.eps)
    return [worst.evidence()]


def cmp_paper_late(rounds: int) -> list[Evidence]:
    """Compare at variances from the constant up; just below it, at mean 0, the comparison must fail."""
    worst = Worst(
        "dense sigma with eps outside and of layer_norm, var at and above max(0, (1 - eps)/2)^2: excess"
    )
    sharp = Worst("the same just below the constant, at mean 0: share by which it fails to fail")
    for layer, x in cases("rms_norm_outside", seed=7, rounds=rounds, gained=False, dimensions=(3, 4, 9, 16)):
        x = x[(x != x[:, :1]).any(-1) & (x.abs().amax(-1) < 1e20)]
        centred = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
        constant = max(0.0, (1 - layer.eps) / 2)
        for size in (constant, 1.01 * constant, 0.5, 1.0, 7.0):
            for shift in (0.0, -5.0):
                at = centred * max(size, 1e-3) + shift
                rms, ln = (dense_norm_sigma(kind, at, layer.eps) for kind in OUTSIDE)
                worst.update((rms / ln - 1).clamp(min=0), at, eps=layer.eps)
        if constant > 0:
            at = centred * constant * 0.99
            rms, ln = (dense_norm_sigma(kind, at, layer.eps) for kind in OUTSIDE)
            sharp.update((1 - rms / ln).clamp(min=0), at, eps=layer.eps)
    return [worst.evidence(), sharp.evidence()]


def cmp_lt1(rounds: int) -> list[Evidence]:
    """Count rows where sigma < 1 and the criterion disagree, those within rounding of 1 left out."""
    worst = Worst("dense sigma of layer_norm < 1 against the criterion: disagreement (0 or 1)", 0.0)
    for layer, x in cases("layer_norm", seed=8, rounds=rounds, gained=False):
        for size in (0.1, 1.0, 3.0):
            at = (x * size)[x.abs().amax(-1) < 1e20]
            sigma, s = dense_norm_sigma("layer_norm", at, layer.eps), layer.denominator(at)
            flat = (at == at[:, :1]).all(-1)
            d = x.shape[-1]
            if d == 1:
                says = torch.ones_like(flat)
            elif d == 2:
                says = torch.where(flat, torch.full_like(flat, layer.eps > 1), layer.eps < s**3)
            else:
                says = s.square() > 1
            far = (sigma - 1).abs() > EXACT
            worst.update(((sigma < 1) != says)[far].double(), at[far], eps=layer.eps)
    return [worst.evidence()]


def cmp_lt1_gain_scaled(rounds: int) -> list[Evidence]:
    """Compare s^2 with the squares of the gains on both sides of where sigma passes 1."""
    enough = Worst("dense sigma with gain where s^2 > |gamma|_(1)^2, against 1: excess")
    needed = Worst("dense sigma with gain where s^2 <= |gamma|_(3)^2 (2nd for RMSNorm), against 1: shortfall")
    for kind, nth in (("layer_norm", 3), ("rms_norm", 2)):
        for layer, x in cases(kind, seed=12, rounds=rounds, gained=True, dimensions=(3, 4, 7, 12)):
            weight = torch.ones(x.shape[-1], dtype=x.dtype) if layer.weight is None else layer.weight
            gains = weight.abs().sort(descending=True).values
            centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
            size = centred.square().mean(-1, keepdim=True).sqrt()
            unit = (centred / size)[((size > 1e-9) & (size < 1e9)).squeeze(-1)]
            for target, worst, sign in ((gains[0], enough, 1), (gains[nth - 1], needed, -1)):
                # s lands just off its target, or well off it.
                for near in (1 + sign * 1e-6, 1 + sign * 0.3):
                    square = float(near * target) ** 2 - layer.eps
                    if square > 0:
                        at = unit * square**0.5
                        sigma = dense_sigma(autograd_jacobian(layer, at))
                        worst.update((sign * (sigma - 1)).clamp(min=0), at, eps=layer.eps, weight=weight)
    return [enough.evidence(), needed.evidence()]


PROPERTIES: dict[str, Property] = {
    "CMP-SAME": cmp_same,
    "CMP-PAPER-LATE": cmp_paper_late,
    "CMP-LT1": cmp_lt1,
    "CMP-LT1-GAIN-SCALED": cmp_lt1_gain_scaled,
}
