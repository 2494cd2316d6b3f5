"""Where eps stands, the sphere, and the variants of the norms, on numbers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from preln.testing.cases import cases
from preln.testing.hunt import norm_module_evidence
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import Property, Worst
from preln.theory import Evidence

EXAMPLES = 6
"""Hypothesis examples a module and round."""
ONE_PLUS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P")


def rms_eps(rounds: int) -> list[Evidence]:
    """Check the two bounds on the ratio of dense sigmas, and that ms = 1 and ms = 0 attain them."""
    bounds = Worst(
        "sigma with eps outside over sigma inside, by dense SVD: share by which its bounds are broken"
    )
    sharp = Worst("the same at ms = 1, and (eps <= 1) as ms goes to 0: distance from the bound")
    for layer, x in cases("rms_norm_outside", seed=21, rounds=rounds, gained=False, dimensions=(2, 3, 8)):
        unit = x / x.abs().amax(-1, keepdim=True)
        unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
        low, high = (1 + layer.eps) ** -0.5, max(1.0, layer.eps**-0.5)
        for rms in (1e-9, 1e-3, 0.3, 0.5, 1.0, 4.0, 1e6):
            at = unit * rms
            ratio = _dense(NormLayer("rms_norm_outside", layer.eps), at) / _dense(
                NormLayer("rms_norm", layer.eps), at
            )
            bounds.update(torch.maximum(low / ratio - 1, ratio / high - 1).clamp(min=0), at, eps=layer.eps)
            if rms == 1.0:
                sharp.update((ratio / low - 1).abs(), at, eps=layer.eps)
        if layer.eps <= 1:
            at = unit * layer.eps * 1e-12
            ratio = _dense(NormLayer("rms_norm_outside", layer.eps), at) / _dense(
                NormLayer("rms_norm", layer.eps), at
            )
            sharp.update((ratio / high - 1).abs(), at, eps=layer.eps)
    return [bounds.evidence(), sharp.evidence()]


def rms_sphere(rounds: int) -> list[Evidence]:
    """Differentiate the sphere map in d + 1 dimensions and compare its block with autograd of RMSNorm."""
    block = Worst(
        "autograd of sqrt(d) z/|z| at z = (x, sqrt(d eps)), first d entries, against torch's rms_norm"
    )
    image = Worst("|RMSNorm(x)|^2 against d (1 - eps/s^2)")
    for layer, x in cases("rms_norm", seed=22, rounds=rounds, gained=False):
        d = x.shape[-1]
        extended = torch.cat([x, torch.full_like(x[:, :1], (d * layer.eps) ** 0.5)], dim=-1)
        # Scaled first: squares of 1e30 are fine in float64, but those of the smallest numbers are not.
        size = extended.abs().amax(-1, keepdim=True)
        whole = autograd_jacobian(_sphere, extended / size)[:, :d, :d] / size[..., None]
        s = layer.denominator(x)
        block.update((whole - autograd_jacobian(layer, x)).abs().amax((-2, -1)) * s, x, eps=layer.eps)
        expected = 1 - layer.eps / s.square()
        image.update((layer(x).square().mean(-1) - expected).abs(), x, eps=layer.eps)
    return [block.evidence(), image.evidence()]


def _sphere(z: Tensor) -> Tensor:
    """Bring z of d + 1 entries to length sqrt(d)."""
    return (z.shape[-1] - 1) ** 0.5 * z / z.square().sum(-1, keepdim=True).sqrt()


def var_heads(rounds: int) -> list[Evidence]:
    """Differentiate a norm on every head, as one function of all entries."""
    whole = Worst(
        "dense sigma of torch's norms on each of 3 heads, all entries at once, against the largest head's"
    )
    blocks = Worst("the same Jacobian outside the heads' blocks: largest entry", 0.0)
    for kind in ("rms_norm", "layer_norm"):
        for layer, x in cases(kind, seed=24, rounds=rounds, gained=True, dimensions=(2, 3, 5)):
            d = x.shape[-1]
            at = x[: len(x) // 3 * 3].reshape(-1, 3, d)

            def flat(z: Tensor, layer: NormLayer = layer, d: int = d) -> Tensor:
                return layer(z.unflatten(-1, (3, d))).flatten(-2)

            actual = autograd_jacobian(flat, at.flatten(-2)).unflatten(-1, (3, d)).unflatten(-3, (3, d))
            outside = 1 - torch.eye(3, dtype=x.dtype)[:, None, :, None]
            blocks.update((actual * outside).abs().amax((-4, -3, -2, -1)), at.flatten(-2), eps=layer.eps)
            sigma = dense_sigma(actual.flatten(-2).flatten(-3, -2))
            expected = layer.sigma(at).amax(-1)
            unit = layer.bounds(at)[1].amax(-1)
            errors = (sigma - expected).abs() / torch.where(unit > 0, unit, torch.ones_like(unit))
            whole.update(errors, at.flatten(-2), eps=layer.eps, weight=layer.weight)
    modules = norm_module_evidence(["CohereLayerNorm per head"], EXAMPLES * rounds)
    return [whole.evidence(), blocks.evidence(), *modules]


def modules(names: tuple[str, ...], rounds: int) -> list[Evidence]:
    """Hunt the worst error of norm modules in use."""
    return norm_module_evidence(names, EXAMPLES * rounds)


def _dense(layer: NormLayer, x: Tensor) -> Tensor:
    return dense_sigma(autograd_jacobian(layer, x))


PROPERTIES: dict[str, Property] = {
    "RMS-EPS": rms_eps,
    "RMS-SPHERE": rms_sphere,
    "VAR-HEADS": var_heads,
    "VAR-ONE-PLUS": partial(modules, ONE_PLUS),
    "VAR-PLAIN": partial(modules, ("OlmoLayerNorm", "GPT2Block.ln_1")),
}
