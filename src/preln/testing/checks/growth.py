"""How the residual stream and the bounds grow with depth, on numbers (STK-GROWTH, STK-INIT)."""

from __future__ import annotations

from math import log, sqrt

import torch

from preln.testing.properties import Property, Worst
from preln.theory import Evidence

DEPTHS = (2, 3, 4, 7, 24, 200, 5000)
POWERS = (0.0, 0.1, 0.5, 0.9, 1.0, 1.3, 2.0, 5.0)


def stk_growth(rounds: int) -> list[Evidence]:
    """Check the growth of the stream over all signs, and the sums and products at many depths."""
    return [_uncorrelated(rounds), *_square_root_sums(), *_power_products()]


def _uncorrelated(rounds: int) -> Evidence:
    """Average over all signs of the branches: their outputs are then exactly uncorrelated."""
    worst = Worst("mean |x_l|^2 over all 2^l signs of branches with |F_k|^2 = v against |x_0|^2 + l v")
    generator = torch.Generator().manual_seed(18)
    for depth in (1, 2, 3, 6, 9) * rounds:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * depth).reshape(
            -1, depth
        )
        start = torch.randn(1, 4, dtype=torch.float64, generator=generator)
        updates = torch.randn(depth, 4, dtype=torch.float64, generator=generator)
        v = float(torch.rand(1, generator=generator)) * 10 + 1e-3
        updates = updates * v**0.5 / updates.norm(dim=-1, keepdim=True)
        mean = (start + signs @ updates).square().sum(-1).mean()
        expected = start.square().sum() + depth * v
        worst.update((mean / expected - 1).abs()[None], start, branches=updates)
    return worst.evidence()


def _square_root_sums() -> list[Evidence]:
    """Check both integral bounds of sum k^(-1/2); the gap between them, and to the sum, must stay below 1."""
    worst = Worst(
        "sum_{k=l}^{L-1} k^(-1/2) between 2(sqrt L - sqrt l) and 2(sqrt(L-1) - sqrt(l-1)), 1 <= l < L: excess"
    )
    close = Worst("the sum less its lower bound against l^(-1/2) - L^(-1/2), which it never exceeds: excess")
    for last in DEPTHS:
        terms = torch.arange(1, last, dtype=torch.float64).rsqrt()
        sums = terms.flip(0).cumsum(0).flip(0)
        start = torch.arange(1, last, dtype=torch.float64)
        low = 2 * (sqrt(last) - start.sqrt())
        high = 2 * (sqrt(last - 1) - (start - 1).sqrt())
        worst.update(torch.maximum(low - sums, sums - high).clamp(min=0) / sums, start[:, None], last=last)
        close.update((sums - low - start.rsqrt() + last**-0.5).clamp(min=0) / sums, start[:, None], last=last)
    return [worst.evidence(), close.evidence()]


def _power_products() -> list[Evidence]:
    """Check prod (1 + p/k) against (L/l)^p from the side that p is on, and against the bound for every p."""
    sided = Worst(
        "prod_{k=l}^{L-1} (1 + p/k) against (L/l)^p: at least for p <= 1, at most for p >= 1: excess"
    )
    always = Worst("the same against ((L-1)/(l-1))^p, l >= 2, for every p >= 0: excess")
    equal = Worst("the same against (L/l)^p at p = 0 and p = 1, where it is attained: difference")
    for last in DEPTHS:
        start = torch.arange(1, last, dtype=torch.float64)
        for p in POWERS:
            logs = (p / start).log1p().flip(0).cumsum(0).flip(0)
            power = p * (log(last) - start.log())
            gap = power - logs if p <= 1 else logs - power
            sided.update(gap.clamp(min=0), start[:, None], last=last, p=p)
            if p in (0.0, 1.0):
                equal.update(gap.abs(), start[:, None], last=last, p=p)
            if last > 2:
                shifted = p * (log(last - 1) - (start[1:] - 1).log())
                always.update((logs[1:] - shifted).clamp(min=0), start[1:, None], last=last, p=p)
    return [sided.evidence(), always.evidence(), equal.evidence()]


def stk_init(rounds: int) -> list[Evidence]:
    """Average over random matrices what each half adds; theory must lie within 5 standard errors."""
    worst = Worst("mean |W2 relu(W1 y)|^2 over draws of W1, W2 against d/2, in standard errors", 5.0)
    mixing = Worst("mean |W x|^2 over draws of W against |x|^2, in standard errors", 5.0)
    last = Worst(
        "mean variance of y + W2 relu(W1 y), y normed, against 3/2 - 1/(2d), in standard errors", 5.0
    )
    generator = torch.Generator().manual_seed(19)
    for d in (4, 16, 48):
        draws = 150 * rounds * 16 // max(d, 16)
        y = torch.randn(1, d, dtype=torch.float64, generator=generator)
        y = y - y.mean()
        y = y * d**0.5 / y.norm()  # what LayerNorm puts out: mean 0, length sqrt(d)
        first, second = torch.randn(2, draws, d, d, dtype=torch.float64, generator=generator) / d**0.5
        hidden = y @ first.mT
        out = hidden.relu() @ second.mT
        for values, expected, target in (
            (out.square().sum((-2, -1)), d / 2, worst),
            (hidden.square().sum((-2, -1)), float(d), mixing),
            ((y + out).var((-2, -1), correction=0), last_variance(d), last),
        ):
            error = (values.mean() - expected).abs() / (values.std() / draws**0.5)
            target.update(error[None], y, draws=draws)
    return [worst.evidence(), mixing.evidence(), last.evidence()]


def last_variance(d: int) -> float:
    """Return the mean of s^2 at Post-LN's last norm: y has mean 0 and counts whole, the rest (1 - 1/d)/2."""
    return 1.5 - 0.5 / d


PROPERTIES: dict[str, Property] = {"STK-GROWTH": stk_growth, "STK-INIT": stk_init}
