"""How alike a block's input and output can be, on numbers (SIM-*)."""

from __future__ import annotations

from math import floor, pi

import torch
from torch import Tensor

from preln.testing.properties import Property, Worst
from preln.theory import Evidence


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _places(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between vectors, to all digits at both ends: 2 atan2(|a - b|, |a + b|), lengths 1."""
    a, b = (torch.nn.functional.normalize(v, dim=-1) for v in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def _steepest(x: Tensor, f: Tensor, rho: Tensor) -> Tensor:
    """Return the update of length rho |x| in span(x, f) that turns x furthest: <x,F> = -|F|^2."""
    size = x.norm(dim=-1, keepdim=True)
    side = f - (f * x).sum(-1, keepdim=True) / size.square() * x
    side = torch.nn.functional.normalize(side, dim=-1) * size
    return -rho.square() * x + rho * (1 - rho.square()).sqrt() * side


def sim_bi(rounds: int) -> list[Evidence]:
    """Check both bounds on random updates, and that the sharp ones reach the first."""
    worst = Worst("1 - cos(x, x + F) <= 1 - sqrt(1 - rho^2) <= rho^2: excess")
    sharp = Worst("1 - cos(x, x + F) = 1 - sqrt(1 - rho^2) where <x,F> = -|F|^2: difference")
    generator = torch.Generator().manual_seed(11)
    for d in (1, 2, 3, 16) * (4 * rounds):
        x, f = _random(2, 32, d, generator=generator)
        rho = torch.rand(32, 1, dtype=torch.float64, generator=generator) * 0.999
        size = x.norm(dim=-1, keepdim=True)
        bound, r = 1 - (1 - rho.square()).sqrt().squeeze(-1), rho.squeeze(-1)
        influence = 1 - torch.cosine_similarity(x, x + f / f.norm(dim=-1, keepdim=True) * rho * size, dim=-1)
        worst.update(torch.maximum(influence - bound, bound - r.square()).clamp(min=0), x, rho=float(r.max()))
        if d > 1:
            influence = 1 - torch.cosine_similarity(x, x + _steepest(x, f, rho), dim=-1)
            sharp.update((influence - bound).abs(), x, rho=float(r.max()))
    return [worst.evidence(), sharp.evidence()]


def sim_angle(rounds: int) -> list[Evidence]:
    """Turn x by random updates, by the one that turns it furthest, and by longer ones to any angle."""
    worst = Worst("angle(x, x + F) against arcsin(rho), rho < 1: excess")
    sharp = Worst("the same where <x,F> = -|F|^2, where it is attained: difference")
    longer = Worst("rho > 1, d >= 2: the wanted angle against that of x and x + F: difference")
    generator = torch.Generator().manual_seed(44)
    for d in (1, 2, 3, 16) * (4 * rounds):
        x, f = _random(2, 32, d, generator=generator)
        rho = torch.rand(32, 1, dtype=torch.float64, generator=generator) * 0.999
        rho[:4] *= 1e-6
        bound = rho.asin().squeeze(-1)
        update = torch.nn.functional.normalize(f, dim=-1) * rho * x.norm(dim=-1, keepdim=True)
        worst.update((angle(x, x + update) - bound).clamp(min=0), x, rho=float(rho.max()))
        if d > 1:
            sharp.update((angle(x, x + _steepest(x, f, rho)) - bound).abs(), x, rho=float(rho.max()))
            wanted = _places(0.0, pi, 32)
            longer.update((angle(x, x + _turning(x, f, 1.01 + rho, wanted)) - wanted).abs(), x)
    return [worst.evidence(), sharp.evidence(), longer.evidence()]


def _turning(x: Tensor, f: Tensor, rho: Tensor, wanted: Tensor) -> Tensor:
    """Return the update of length rho |x|, rho > 1, after which x + F has the wanted angle to x."""
    size = x.norm(dim=-1, keepdim=True)
    side = torch.nn.functional.normalize(f - (f * x).sum(-1, keepdim=True) / size.square() * x, dim=-1)
    cosine, sine = wanted.cos()[:, None], wanted.sin()[:, None]
    # |t e - x| = rho |x| with e the unit vector at the wanted angle: the positive root for t/|x|.
    reach = cosine + (cosine.square() + rho.square() - 1).sqrt()
    return reach * size * (cosine * x / size + sine * side) - x


def sim_triangle(rounds: int) -> list[Evidence]:
    """Walk through random states, near to each other and far apart."""
    worst = Worst("angular distance from x_0 to x_n against the sum of the adjacent ones: excess")
    generator = torch.Generator().manual_seed(45)
    for d in (1, 2, 3, 16) * rounds:
        for step in (1e-3, 0.3, 10.0):
            states = _random(32, 7, d, generator=generator)
            states = states[:, :1] + step * states.cumsum(1)
            steps = angle(states[:, :-1], states[:, 1:])
            for n in range(1, states.shape[1]):
                across = angle(states[:, 0], states[:, n])
                worst.update((across - steps[:, :n].sum(-1)).clamp(min=0), states, step=step)
    return [worst.evidence()]


def sim_sum_arc(rounds: int) -> list[Evidence]:
    """Walk in one direction along a great circle, up to half of it; past the half it must fail."""
    equal = Worst("states in order on an arc of at most pi: distance across against the sum: difference")
    beyond = Worst("the same on arcs of 1.1 to 1.9 pi, where they must differ by at least 0.2 pi: shortfall")
    generator = torch.Generator().manual_seed(46)
    for d in (2, 3, 16) * rounds:
        one, two = torch.linalg.qr(_random(32, d, 2, generator=generator))[0].unbind(-1)
        places = torch.rand(32, 7, dtype=torch.float64, generator=generator).sort(-1).values
        places = (places - places[:, :1]) / (places[:, -1:] - places[:, :1])
        lengths = _random(32, 7, generator=generator).exp()
        for arcs, worst in (
            (_places(0.01, 1.0, 32) * pi, equal),
            (_places(1.1, 1.9, 32) * pi, beyond),
        ):
            if worst is beyond:
                # evenly spaced, so that no single step passes pi
                places = _places(0, 1, 7).expand(32, 7)
            at = arcs[:, None] * places
            states = at.cos()[..., None] * one[:, None] + at.sin()[..., None] * two[:, None]
            states = states * lengths[..., None]
            total = angle(states[:, :-1], states[:, 1:]).sum(-1)
            across = angle(states[:, 0], states[:, -1])
            error = (across - total).abs() if worst is equal else 0.2 * pi - (total - across)
            worst.update(error.clamp(min=0), states)
    return [equal.evidence(), beyond.evidence()]


def sim_global(rounds: int) -> list[Evidence]:
    """Check the weighted sum on random batches, then the instance with any difference from the mean."""
    identity = Worst("cosine of the flattened batches against sum w_t cos_t, w_t = |x_t||y_t|/(|X||Y|)")
    weights = Worst(
        "sum w_t against 1, and, where the |y_t|/|x_t| are all equal, against it from below: excess"
    )
    apart = Worst("|cosine of the flattened batches - mean cosine| against 2: excess")
    instance = Worst("n tokens, one with cosine 1, the others -1: global less mean against delta")
    generator = torch.Generator().manual_seed(47)
    for tokens, d in ((1, 3), (2, 1), (7, 4), (50, 8)) * rounds:
        x, y = _random(2, 16, tokens, d, generator=generator)
        x = x * _random(16, tokens, 1, generator=generator).exp()
        for other, tight in ((y, False), (1.7 * x.flip(-1), True)):
            whole = torch.cosine_similarity(x.flatten(1), other.flatten(1), dim=-1)
            w = x.norm(dim=-1) * other.norm(dim=-1)
            w = w / (x.flatten(1).norm(dim=-1) * other.flatten(1).norm(dim=-1))[:, None]
            identity.update((whole - (w * torch.cosine_similarity(x, other, dim=-1)).sum(-1)).abs(), x)
            gap = (whole - torch.cosine_similarity(x, other, dim=-1).mean(-1)).abs()
            apart.update((gap - 2).clamp(min=0), x)
            excess = w.sum(-1) - 1
            weights.update(excess.abs() if tight else excess.clamp(min=0), x)
    deltas = 2 * torch.rand(8 * rounds, dtype=torch.float64, generator=generator)
    for delta in [1e-6, 0.5, 1.0, 1.5, 1.999, *deltas.tolist()]:
        for tokens in (floor(2 / (2 - delta)) + 1, floor(2 / (2 - delta)) + 5):
            x, y = _far_apart(delta, tokens)
            mean = torch.cosine_similarity(x, y, dim=-1).mean()
            whole = torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)
            instance.update((whole - mean - delta).abs()[None], torch.tensor([[delta]]), tokens=tokens)
    return [identity.evidence(), weights.evidence(), instance.evidence(), apart.evidence()]


def _far_apart(delta: float, tokens: int) -> tuple[Tensor, Tensor]:
    """Return `[n, 1]` batches whose global cosine exceeds the mean cosine by delta, n > 2/(2 - delta)."""
    share = delta / 2 + 1 / tokens
    x = torch.ones(tokens, 1, dtype=torch.float64)
    x[0] = ((tokens - 1) * share / (1 - share)) ** 0.5
    y = -x
    y[0] = x[0]
    return x, y


PROPERTIES: dict[str, Property] = {
    "SIM-BI": sim_bi,
    "SIM-ANGLE": sim_angle,
    "SIM-TRIANGLE": sim_triangle,
    "SIM-SUM-ARC": sim_sum_arc,
    "SIM-GLOBAL": sim_global,
}
