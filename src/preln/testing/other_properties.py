"""The comparison, stack and similarity theorems on numbers, and every counterexample again in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from preln.testing.cases import cases
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.norm_properties import denominator
from preln.testing.properties import EXACT, Property, Worst
from preln.theory import Evidence

LATE = 0.25


def _sigmas(kind: str, x: Tensor, eps: float) -> Tensor:
    return dense_sigma(autograd_jacobian(NormLayer(kind, eps), x))


def cmp_same(rounds: int) -> list[Evidence]:
    """Compare dense sigmas of both layers at the same x and eps, d >= 3."""
    worst = Worst("dense sigma of rms_norm and layer_norm: share by which the first exceeds the second")
    for layer, x in cases("layer_norm", seed=6, rounds=rounds, gained=False, dimensions=(3, 4, 9, 16)):
        rms, ln = _sigmas("rms_norm", x, layer.eps), _sigmas("layer_norm", x, layer.eps)
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
            for shift in (0.0, 0.3, -5.0):
                at = centred * max(size, 1e-3) + shift
                rms, ln = _sigmas("rms_norm_outside", at, layer.eps), _sigmas("layer_norm", at, layer.eps)
                worst.update((rms / ln - 1).clamp(min=0), at, eps=layer.eps)
        if constant > 0:
            at = centred * constant * 0.99
            rms, ln = _sigmas("rms_norm_outside", at, layer.eps), _sigmas("layer_norm", at, layer.eps)
            sharp.update((1 - rms / ln).clamp(min=0), at, eps=layer.eps)
    return [worst.evidence(), sharp.evidence()]


def cmp_lt1(rounds: int) -> list[Evidence]:
    """Count rows where sigma < 1 and the criterion disagree, those within rounding of 1 left out."""
    worst = Worst("dense sigma of layer_norm < 1 against the criterion: disagreement (0 or 1)", 0.0)
    for layer, x in cases("layer_norm", seed=8, rounds=rounds, gained=False):
        for size in (0.1, 1.0, 3.0):
            at = (x * size)[x.abs().amax(-1) < 1e20]
            sigma, s = _sigmas("layer_norm", at, layer.eps), denominator(layer, at)
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


def stk_upper(rounds: int) -> list[Evidence]:
    """Multiply random Pre-LN blocks with the Jacobians of real norm layers."""
    worst = Worst("dense sigma of products of 1 to 6 blocks: share by which the bound is exceeded")
    generator = torch.Generator().manual_seed(9)
    for layer, x in cases("rms_norm", seed=9, rounds=rounds, gained=True):
        d = x.shape[-1]
        total = torch.eye(d, dtype=x.dtype).expand(len(x), d, d)
        bound = torch.ones(len(x), dtype=x.dtype)
        log = torch.zeros_like(bound)
        norm = layer.jacobian(x)
        for _ in range(6):
            branch = torch.randn(len(x), d, d, dtype=x.dtype, generator=generator)
            step = dense_sigma(branch) * layer.sigma(x)
            total = (torch.eye(d, dtype=x.dtype) + branch @ norm) @ total
            bound, log = bound * (1 + step), log + step
            worst.update((dense_sigma(total) / bound - 1).clamp(min=0), x, eps=layer.eps, weight=layer.weight)
            worst.update((bound.log() - log).clamp(min=0), x, eps=layer.eps, weight=layer.weight)
    return [worst.evidence()]


def stk_gradient_monotone_psd(rounds: int) -> list[Evidence]:
    """Check the identity, and the smallest singular value of J against semidefiniteness."""
    identity = Worst("|J^T u|^2 - |u|^2 against <u, (M + M^T + M M^T) u>")
    criterion = Worst(
        "smallest singular value of J squared, less 1, against the smallest eigenvalue of the form"
    )
    generator = torch.Generator().manual_seed(10)
    for d in (1, 2, 3, 8) * rounds:
        m = torch.randn(16, d, d, dtype=torch.float64, generator=generator)
        m = m * torch.logspace(-2, 1, 16, dtype=torch.float64)[:, None, None]
        u = torch.randn(16, d, dtype=torch.float64, generator=generator)
        form = m + m.mT + m @ m.mT
        j = torch.eye(d, dtype=torch.float64) + m
        pulled = (j.mT @ u[..., None]).squeeze(-1)
        size = u.square().sum(-1) * (1 + dense_sigma(m)).square()
        gap = pulled.square().sum(-1) - u.square().sum(-1) - (u * (form @ u[..., None]).squeeze(-1)).sum(-1)
        identity.update(gap.abs() / size, u)
        least = torch.linalg.svdvals(j)[:, -1].square() - 1 - torch.linalg.eigvalsh(form)[:, 0]
        criterion.update(least.abs() / (1 + dense_sigma(m)).square(), u)
    return [identity.evidence(), criterion.evidence()]


def sim_bi(rounds: int) -> list[Evidence]:
    """Check both bounds on random updates, and that the sharp ones reach the first."""
    worst = Worst("1 - cos(x, x + F) <= 1 - sqrt(1 - rho^2) <= rho^2: excess")
    sharp = Worst("1 - cos(x, x + F) = 1 - sqrt(1 - rho^2) where <x,F> = -|F|^2: difference")
    generator = torch.Generator().manual_seed(11)
    for d in (1, 2, 3, 16) * (4 * rounds):
        x, f = torch.randn(2, 32, d, dtype=torch.float64, generator=generator)
        rho = torch.rand(32, 1, dtype=torch.float64, generator=generator) * 0.999
        size = x.norm(dim=-1, keepdim=True)
        bound, r = 1 - (1 - rho.square()).sqrt().squeeze(-1), rho.squeeze(-1)
        influence = 1 - torch.cosine_similarity(x, x + f / f.norm(dim=-1, keepdim=True) * rho * size, dim=-1)
        worst.update(torch.maximum(influence - bound, bound - r.square()).clamp(min=0), x, rho=float(r.max()))
        if d > 1:
            side = f - (f * x).sum(-1, keepdim=True) / size.square() * x
            side = side / side.norm(dim=-1, keepdim=True) * size
            steepest = -rho.square() * x + rho * (1 - rho.square()).sqrt() * side
            influence = 1 - torch.cosine_similarity(x, x + steepest, dim=-1)
            sharp.update((influence - bound).abs(), x, rho=float(r.max()))
    return [worst.evidence(), sharp.evidence()]


def reproduce(detail: dict[str, Any], id: str) -> Evidence:
    """Evaluate a counterexample again, by autograd in float64, against the ledger's exact values."""
    instance, values = detail["instance"], detail["values"]
    x = torch.tensor([[_number(v) for v in instance["x"]]], dtype=torch.float64)
    eps = _number(instance["eps"])
    worst = Worst(f"autograd in float64 against the exact values of {id}'s counterexample")
    if "upstream" in instance:
        branch = torch.tensor([[_number(v) for v in row] for row in instance["branch"]], dtype=torch.float64)
        upstream = torch.tensor([_number(v) for v in instance["upstream"]], dtype=torch.float64)
        block = torch.eye(x.shape[-1], dtype=x.dtype)
        block = block + branch @ autograd_jacobian(NormLayer(instance["layer"], eps), x)[0]
        found = {"gradient_norm_before": (block.T @ upstream).norm(), "gradient_norm_after": upstream.norm()}
    elif "layers" in instance:
        found = {
            name: _sigmas(kind, x, eps)[0]
            for name, kind in zip(("sigma_rms", "sigma_ln"), instance["layers"], strict=True)
        }
    else:
        found = {"sigma": _sigmas(instance["layer"], x, eps)[0]}
    for name, value in found.items():
        exact = _number(values[name])
        worst.update((value - exact).abs().reshape(1) / max(abs(exact), 1.0), x, quantity=name)
    return worst.evidence()


def _number(text: Any) -> float:
    from fractions import Fraction

    return float(Fraction(str(text)))


PROPERTIES: dict[str, Property] = {
    "CMP-SAME": cmp_same,
    "CMP-PAPER-LATE": cmp_paper_late,
    "CMP-LT1": cmp_lt1,
    "STK-UPPER": stk_upper,
    "STK-GRADIENT-MONOTONE-PSD": stk_gradient_monotone_psd,
    "SIM-BI": sim_bi,
}
