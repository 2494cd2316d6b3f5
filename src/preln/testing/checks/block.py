"""One block's Jacobian, for every placement of the norm, on real branches (BLK-*).

Autograd of the whole block over the whole sequence, `[T d, T d]`, against the product built from pieces: the
branches' Jacobians by autograd, the norms' from the closed forms. At x = 0 without gain RMSNorm's Jacobian is
I/sqrt(eps), so there linear branches c I make every bound an equality: that is where sharpness is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from preln.testing.checks.branches import (
    WIDTH,
    Block,
    Draw,
    draws,
    multiple_of_identity,
    over_tokens,
    part,
    pre_norm_part,
    sequence_jacobian,
    smallest,
)
from preln.testing.layers import NormLayer, dense_sigma
from preln.testing.properties import Property, Worst
from preln.theory import Evidence


class Placed(NamedTuple):
    """A block with its norm in one place: the map, the Jacobian's formula, and bounds, `[n]` each.

    Attributes:
        layer: the block, on `[n, T, d]`.
        formula: its Jacobian from the pieces.
        upper: bound of sigma(J).
        change: bound of sigma(J - I), or None.
        lower: bound of the smallest singular value, or None.
    """

    layer: Callable[[Tensor], Tensor]
    formula: Tensor
    upper: Tensor
    change: Tensor | None
    lower: Tensor | None


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2] * x.shape[-1], dtype=x.dtype)


def pre(draw: Draw) -> Placed:
    """Pre-LN: h = x + attention(N1(x)), h + MLP(N2(h)); J = (I + A2 G2)(I + A1 G1)."""
    one, two = Block(draw.first, draw.attention), Block(draw.second, draw.mlp)
    h = draw.x + one.update(draw.x)
    p, q, eye = pre_norm_part(one, draw.x), pre_norm_part(two, h), _eye(draw.x)
    upper = (1 + p.a * p.g) * (1 + q.a * q.g)
    lower = (1 - p.a * p.g).clamp(min=0) * (1 - q.a * q.g).clamp(min=0)
    return Placed(
        lambda z: (m := z + one.update(z)) + two.update(m),
        (eye + q.branch @ q.norm) @ (eye + p.branch @ p.norm),
        upper,
        upper - 1,
        lower,
    )


def parallel(draw: Draw) -> Placed:
    """Attention and MLP side by side: J = I + A_a G_a + A_m G_m."""
    one, two = Block(draw.first, draw.attention), Block(draw.second, draw.mlp)
    p, q = pre_norm_part(one, draw.x), pre_norm_part(two, draw.x)
    step = p.a * p.g + q.a * q.g
    formula = _eye(draw.x) + p.branch @ p.norm + q.branch @ q.norm
    return Placed(
        lambda z: z + one.update(z) + two.update(z), formula, 1 + step, step, (1 - step).clamp(min=0)
    )


def post(draw: Draw) -> Placed:
    """Post-LN: N(x + F(x)); J = G (I + A), A at x and G at x + F(x)."""
    branch, norm = draw.mlp, draw.first
    p = part(branch, draw.x, norm, draw.x + branch(draw.x))
    formula = p.norm @ (_eye(draw.x) + p.branch)
    return Placed(lambda z: norm(z + branch(z)), formula, p.g * (1 + p.a), None, None)


def sandwich(draw: Draw) -> Placed:
    """Norm before and after the branch: x + N2(F(N1(x))); J = I + G2 A G1."""
    before, branch, after = draw.first, draw.attention, draw.second
    p = pre_norm_part(Block(before, branch), draw.x)
    q = part(branch, before(draw.x), after, branch(before(draw.x)))
    step = p.a * p.g * q.g
    formula = _eye(draw.x) + q.norm @ p.branch @ p.norm
    return Placed(lambda z: z + after(branch(before(z))), formula, 1 + step, step, (1 - step).clamp(min=0))


def after(draw: Draw) -> Placed:
    """Norm after the branch only: x + N(F(x)); J = I + G A, A at x and G at F(x)."""
    branch, norm = draw.attention, draw.first
    p = part(branch, draw.x, norm, branch(draw.x))
    step, formula = p.a * p.g, _eye(draw.x) + p.norm @ p.branch
    return Placed(lambda z: z + norm(branch(z)), formula, 1 + step, step, (1 - step).clamp(min=0))


def _at_origin(rounds: int) -> Iterator[tuple[bool, Draw]]:
    """Yield zero sequences with linear branches c I of one sign: every bound is an equality there."""
    x = torch.zeros(1, 3, WIDTH, dtype=torch.float64)
    for turn in range(min(rounds, 5)):  # nothing is random here: five values of eps are enough
        first, second = NormLayer("rms_norm", 0.25 * 2.0**turn), NormLayer("rms_norm", 0.5)
        for c, other in ((0.3, 0.7), (2.0, 0.1), (-0.3, -0.4), (-0.05, -0.6)):
            # a g = |c| for the first norm, up to the second's eps in the sandwich.
            branches = [multiple_of_identity(k * n.eps**0.5) for k, n in ((c, first), (other, second))]
            yield c > 0, Draw(branches[0], branches[1], first, second, x)


def _measure(place: Callable[[Draw], Placed], bounds: str, seed: int, rounds: int) -> list[Evidence]:
    """Compare Jacobians with their formula and singular values with their bounds, then where attained."""
    product = Worst(f"autograd over the whole sequence against the formula. {place.__doc__}")
    bounded = Worst(f"dense singular values of that Jacobian against {bounds}: share by which they break")
    sharp = Worst("the same bounds at x = 0 with linear branches c I, where they are attained: difference")
    for draw in draws(seed=seed, rounds=rounds):
        placed = place(draw)
        jacobian = sequence_jacobian(placed.layer, draw.x)
        size = placed.formula.abs().amax((-2, -1)).clamp(min=1)
        product.update((jacobian - placed.formula).abs().amax((-2, -1)) / size, draw.x)
        sigma = dense_sigma(jacobian)
        bounded.update((sigma - placed.upper).clamp(min=0) / placed.upper, draw.x)
        if placed.change is not None:
            moved = dense_sigma(jacobian - _eye(draw.x)) - placed.change
            bounded.update(moved.clamp(min=0) / placed.change.clamp(min=1e-6), draw.x)
        if placed.lower is not None:
            short = placed.lower - smallest(jacobian)
            bounded.update(short.clamp(min=0) / sigma.clamp(min=1), draw.x)
    for positive, draw in _at_origin(rounds):
        placed = place(draw)
        jacobian = sequence_jacobian(placed.layer, draw.x)
        pairs = [(dense_sigma(jacobian), placed.upper)]
        if placed.change is not None:
            pairs.append((dense_sigma(jacobian - _eye(draw.x)), placed.change))
        if not positive:
            pairs = [] if placed.lower is None else [(smallest(jacobian), placed.lower)]
        for value, bound in pairs:
            sharp.update((value - bound).abs() / bound.clamp(min=1), draw.x)
    return [product.evidence(), bounded.evidence(), sharp.evidence()]


def blk_pre(rounds: int) -> list[Evidence]:
    """Check a Pre-LN block of attention and MLP."""
    return _measure(pre, "(1 + a1 g1)(1 + a2 g2), the same less 1 for J - I, and max(0, ..)(..)", 20, rounds)


def blk_parallel(rounds: int) -> list[Evidence]:
    """Check attention and MLP side by side, with two norms and with a shared one."""
    shared = Worst("sigma(J - I) with one shared norm against g sigma(A_a + A_m): share by which it breaks")
    for draw in draws(seed=21, rounds=1 + rounds // 2):
        alike = draw._replace(second=draw.first)
        p, q = (pre_norm_part(Block(draw.first, b), draw.x) for b in (draw.attention, draw.mlp))
        bound = p.g * dense_sigma(p.branch + q.branch)
        jacobian = sequence_jacobian(parallel(alike).layer, draw.x)
        excess = dense_sigma(jacobian - _eye(draw.x)) - bound
        shared.update(excess.clamp(min=0) / bound.clamp(min=1e-6), draw.x)
    bounds = "1 + a1 g1 + a2 g2, the same less 1 for J - I, and max(0, 1 - a1 g1 - a2 g2)"
    return [*_measure(parallel, bounds, 22, rounds), shared.evidence()]


def blk_post(rounds: int) -> list[Evidence]:
    """Check Post-LN, and what is lost against Pre-LN: directions that no gradient passes."""
    lost = Worst("LayerNorm: the T smallest singular values of J, relative to sigma")
    bare = Worst("F = 0: J against G, and for LayerNorm sigma(J - I) >= 1: shortfall")
    for draw in draws(seed=23, rounds=rounds):
        norm, tokens = draw.first, draw.x.shape[-2]
        jacobian = sequence_jacobian(norm, draw.x)
        closed = part(draw.mlp, draw.x, norm, draw.x)
        error = (jacobian - closed.norm).abs().amax((-2, -1)) / closed.g.clamp(min=1)
        if norm.kind == "layer_norm":
            error = torch.maximum(error, 1 - dense_sigma(jacobian - _eye(draw.x)))
            values = torch.linalg.svdvals(sequence_jacobian(post(draw).layer, draw.x))
            lost.update(values[:, -tokens] / values[:, 0].clamp(min=1e-3), draw.x)
        bare.update(error, draw.x)
    bounds = "g (1 + a) from above"
    return [*_measure(post, bounds, 24, rounds), bare.evidence(), lost.evidence(), *_nearly_lost(rounds)]


def _nearly_lost(rounds: int) -> list[Evidence]:
    """One token: RMSNorm lets the radial direction through only by (1 + a)|gamma|_(1) eps/s^3."""
    radial = Worst(
        "RMSNorm, one token: smallest singular value of J against (1 + a)|gamma|_(1) eps/s^3: excess"
    )
    sharp = Worst("the same with F = c x, c >= 0, and a constant gain, where it is attained: difference")
    for draw in draws(seed=25, rounds=rounds, kinds=("rms_norm",)):
        x, c = draw.x[:, -1:], 0.7
        flat = NormLayer("rms_norm", draw.first.eps, torch.full((WIDTH,), -1.7, dtype=x.dtype))
        for norm, branch, worst in (
            (draw.first, draw.mlp, radial),
            (flat, multiple_of_identity(c), sharp),
        ):
            placed = post(draw._replace(first=norm, mlp=branch))
            top = 1.0 if norm.weight is None else float(norm.weight.abs().max())
            a = dense_sigma(sequence_jacobian(branch, x))
            s = norm.denominator(x + branch(x)).squeeze(-1)
            bound, value = (1 + a) * top * norm.eps / s**3, smallest(sequence_jacobian(placed.layer, x))
            error = value - bound
            worst.update((error.abs() if worst is sharp else error.clamp(min=0)), x)
    return [radial.evidence(), sharp.evidence()]


def blk_sandwich(rounds: int) -> list[Evidence]:
    """Check the sandwich, and that the size of its update does not depend on the branch."""
    size = Worst("rms of the sandwich's update, token by token, against |gamma2|_(1): excess")
    sharp = Worst("the same with a constant gain and eps = 1e-12, where it is approached: difference")
    for draw in draws(seed=26, rounds=rounds):
        outer = draw.second
        constant = NormLayer(outer.kind, 1e-12, torch.full((WIDTH,), 1.3, dtype=draw.x.dtype))
        for factor in (1e-3, 1.0, 1e4):
            out = factor * draw.attention(draw.first(draw.x + 0.1))
            top = 1.0 if outer.weight is None else float(outer.weight.abs().max())
            rms = outer(out).square().mean(-1).sqrt()
            size.update((rms - top).clamp(min=0).amax(-1), draw.x, factor=factor)
        far = 1e4 * torch.nn.functional.normalize(draw.x[2:], dim=-1)
        sharp.update((constant(far).square().mean(-1).sqrt() - 1.3).abs().amax(-1), far)
    bounds = "1 + a g1 g2, the same less 1 for J - I, and max(0, 1 - a g1 g2)"
    return [*_measure(sandwich, bounds, 27, rounds), size.evidence(), sharp.evidence()]


def blk_after(rounds: int) -> list[Evidence]:
    """Check the norm after the branch only."""
    return _measure(after, "1 + a g, the same less 1 for J - I, and max(0, 1 - a g)", 28, rounds)


def blk_tokens(rounds: int) -> list[Evidence]:
    """Compare a norm over a sequence with its tokens."""
    blocks = Worst("autograd of a norm over the sequence against the tokens' Jacobians on the diagonal")
    largest = Worst("sigma of that Jacobian against the largest of the tokens' sigmas")
    attained = Worst("|J v| against sigma, v moving only the token with the largest: difference")
    for draw in draws(seed=29, rounds=rounds):
        norm, x = draw.second, draw.x
        jacobian, tokens = sequence_jacobian(norm, x), norm.jacobian(x)
        sigmas = norm.sigma(x)
        size = sigmas.amax(-1).clamp(min=1e-3)
        blocks.update((jacobian - over_tokens(tokens)).abs().amax((-2, -1)) / size, x)
        largest.update((dense_sigma(jacobian) - sigmas.amax(-1)).abs() / size, x)
        move, rows = torch.zeros_like(x), torch.arange(len(x))
        at = sigmas.argmax(-1)
        move[rows, at] = torch.linalg.svd(tokens[rows, at])[2][:, 0]
        reached = (jacobian @ move.flatten(-2)[..., None]).flatten(1).norm(dim=-1)
        attained.update((reached - sigmas.amax(-1)).abs() / size, x)
    return [blocks.evidence(), largest.evidence(), attained.evidence()]


PROPERTIES: dict[str, Property] = {
    "BLK-TOKENS": blk_tokens,
    "BLK-PRE": blk_pre,
    "BLK-PARALLEL": blk_parallel,
    "BLK-POST": blk_post,
    "BLK-SANDWICH": blk_sandwich,
    "BLK-AFTER": blk_after,
}
