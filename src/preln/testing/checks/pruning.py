"""Dropping blocks on numbers: what it changes, and by how much at most (PRN-*, SPD-*)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from preln.testing.cases import EPS, gain
from preln.testing.checks.branches import (
    WIDTH,
    Block,
    draw_branch,
    draw_stacks,
    hidden_states,
    multiple_of_identity,
)
from preln.testing.layers import NormLayer, dense_sigma
from preln.testing.properties import Property, Worst
from preln.theory import Evidence

DIFFERENCES = 1e-7
"""Tolerance against finite differences of fourth order in float64."""


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=-1)


def prn_telescope(rounds: int) -> list[Evidence]:
    """Drop the last n blocks of real stacks, for every n."""
    worst = Worst("x_L less the output of the stack without its last n blocks, against their updates' sum")
    for blocks, x in draw_stacks(seed=40, rounds=rounds, depth=6):
        states = hidden_states(blocks, x)
        updates = [block.update(state) for block, state in zip(blocks, states, strict=False)]
        for n in range(len(blocks) + 1):
            kept = hidden_states(blocks[: len(blocks) - n], x)[-1]
            total = torch.stack([*updates[len(blocks) - n :], torch.zeros_like(x)]).sum(0)
            size = torch.stack([_length(s) for s in states]).amax(0)
            worst.update(_length(states[-1] - kept - total) / size, x, dropped=n)
    return [worst.evidence()]


def _cross_entropy(head: Tensor, x: Tensor) -> Tensor:
    """Return one loss a sequence: mean over tokens of the cross entropy with token 0."""
    return -(x @ head.mT).log_softmax(-1)[..., 0].mean(-1)


def _slope(loss: Callable[[float], Tensor]) -> Tensor:
    """Return loss'(0) by central differences, the error of second order cancelled (Richardson).

    Of several steps that one counts, for each row, whose estimate is nearest to the one before.
    """
    central = [(loss(h) - loss(-h)) / (2 * h) for h in (4e-3 / 4**k for k in range(8))]
    fine = torch.stack([(16 * b - a) / 15 for a, b in pairwise(central)])
    best = fine.diff(dim=0).abs().argmin(0)
    return fine[1:].gather(0, best[None])[0]


def prn_first_order(rounds: int) -> list[Evidence]:
    """Scale one block's update down by t: slope at 0 on real stacks, remainder at 1 where beta is known."""
    slope = Worst(
        "finite differences of t -> L(x_{k+1} - t F_k) at 0 against -<dL/dx_{k+1}, F_k>", DIFFERENCES
    )
    dropped = Worst("L(x_{k+1} - F_k) against the loss of the stack without block k")
    generator = torch.Generator().manual_seed(41)
    for blocks, x in draw_stacks(seed=41, rounds=rounds):
        head = _random(5, WIDTH, generator=generator)
        for k in range(len(blocks)):
            before = hidden_states(blocks[:k], x)[-1]
            update = blocks[k].update(before)

            def loss(after: Tensor, k: int = k, head: Tensor = head, blocks: list[Block] = blocks) -> Tensor:
                return _cross_entropy(head, hidden_states(blocks[k + 1 :], after)[-1])

            after = (before + update).requires_grad_()
            gradient = torch.autograd.grad(loss(after).sum(), after)[0]
            with torch.no_grad():
                rate = _slope(lambda t, f=update, a=after, loss=loss: loss(a - t * f))
                without = _cross_entropy(head, hidden_states(blocks[:k] + blocks[k + 1 :], x)[-1])
                dropped.update((loss(after - update) - without).abs() / without.clamp(min=1), x, block=k)
            predicted = -(gradient * update).flatten(1).sum(-1)
            size = (_length(gradient) * _length(update)).clamp(min=1)
            slope.update((rate - predicted).abs() / size, x, block=k)
    return [slope.evidence(), dropped.evidence(), *_remainders(rounds, generator)]


def _remainders(rounds: int, generator: torch.Generator) -> list[Evidence]:
    """Compare the remainder at t = 1 with beta/2 |F|^2, beta a Lipschitz constant of the gradient."""
    bound = Worst("|L(x - F) - L(x) + <dL/dx, F>| against beta/2 |F|^2: share by which it is exceeded")
    sharp = Worst(
        "the same for a quadratic loss and F its steepest direction, where it is attained: difference"
    )
    for _ in range(rounds):
        half = _random(WIDTH, WIDTH, generator=generator)
        form, head = half + half.mT, _random(5, WIDTH, generator=generator)
        x, f = _random(2, 16, 1, WIDTH, generator=generator)
        f = f * torch.logspace(-2, 1, 16, dtype=torch.float64)[:, None, None]
        values, vectors = torch.linalg.eigh(form)
        top = vectors[:, values.abs().argmax()].expand_as(f) * _length(f)[:, None, None]
        beta = float(values.abs().max())

        def quadratic(z: Tensor, form: Tensor = form) -> Tensor:
            return ((z @ form) * z).sum((-2, -1)) / 2

        # The softmax's covariance has sigma at most 1/2.
        half_square = float(dense_sigma(head)) ** 2 / 2
        for loss, lipschitz, step, worst in (
            (quadratic, beta, f, bound),
            (lambda z, w=head: _cross_entropy(w, z), half_square, f, bound),
            (quadratic, beta, top, sharp),
        ):
            at = x.clone().requires_grad_()
            gradient = torch.autograd.grad(loss(at).sum(), at)[0]
            remainder = (loss(x - step) - loss(x) + (gradient * step).sum((-2, -1))).abs()
            limit = lipschitz / 2 * step.square().sum((-2, -1))
            # Rounding of the loss itself is what a small step leaves.
            error = (remainder - limit) / (limit + loss(x).abs().clamp(min=1))
            worst.update(error.abs() if worst is sharp else error.clamp(min=0), x)
    return [bound.evidence(), sharp.evidence()]


def prn_bound(rounds: int) -> list[Evidence]:
    """Drop each block in turn; later blocks have a known Lipschitz constant, or a bound of it."""
    worst = Worst("|change of x_L| against |F_k(x_k)| prod_{j>k} Lip_j: share by which it is exceeded")
    sharp = Worst("the same for x + c x, c >= 0, where it is attained: difference")
    generator = torch.Generator().manual_seed(42)
    for turn in range(rounds):
        x = _random(8, 3, WIDTH, generator=generator)
        matrices = [0.7 * _random(WIDTH, WIDTH, generator=generator) for _ in range(4)]
        saturating = [(lambda z, a=a: z.tanh() @ a.mT, 1 + float(dense_sigma(a))) for a in matrices]
        norms = [
            NormLayer(kind, EPS[-1 - turn % 3], gain("normal", WIDTH, generator))
            for kind in ("rms_norm", "layer_norm") * 2
        ]
        linear = [draw_branch("linear", generator, scale=0.5) for _ in norms]
        # sigma(G) <= |gamma|_(1)/sqrt(eps) at every x.
        normed = [
            (Block(n, b).update, 1 + float(dense_sigma(b.weights[0]) * n.weight.abs().max()) / n.eps**0.5)
            for n, b in zip(norms, linear, strict=True)
            if n.weight is not None
        ]
        straight = [(multiple_of_identity(c), 1 + c) for c in (0.5, 0.0, 2.0, 0.1)]
        for blocks, target in ((saturating, worst), (normed, worst), (straight, sharp)):
            _drop_each(blocks, x, target, attained=target is sharp)
    return [worst.evidence(), sharp.evidence()]


def _drop_each(
    blocks: list[tuple[Callable[[Tensor], Tensor], float]], x: Tensor, worst: Worst, *, attained: bool
) -> None:
    """Compare the change of the output with the bound, for every block dropped."""
    for k in range(len(blocks)):
        before = _run([update for update, _ in blocks[:k]], x)
        later = [update for update, _ in blocks[k + 1 :]]
        moved = blocks[k][0](before)
        change = _length(_run(later, before + moved) - _run(later, before))
        bound = _length(moved) * prod(lip for _, lip in blocks[k + 1 :])
        error = (change - bound) / bound.clamp(min=1e-3)
        worst.update(error.abs() if attained else error.clamp(min=0), x, block=k)


def _run(updates: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for update in updates:
        x = x + update(x)
    return x


def _head_bound(norm: NormLayer, head: Tensor, x: Tensor, change: Tensor) -> Tensor:
    """Return sigma(W_U diag(gamma)) 2 sqrt(d)|D|/(sqrt(|x|^2 + d eps) + sqrt(|x+D|^2 + d eps))."""
    if norm.kind == "layer_norm":
        x, change = (z - z.mean(-1, keepdim=True) for z in (x, change))
    d = x.shape[-1]
    sizes = [(z.square().sum(-1) + d * norm.eps).sqrt() for z in (x, x + change)]
    scaled = head if norm.weight is None else head * norm.weight
    return dense_sigma(scaled) * 2 * d**0.5 * change.norm(dim=-1) / (sizes[0] + sizes[1])


def prn_head(rounds: int) -> list[Evidence]:
    """Move the final norm's input by small and large changes; then by one that keeps its length."""
    worst = Worst("|change of the logits| against the bound of both norms: share by which it is exceeded")
    sharp = Worst("the same with |x + D| = |x| and orthogonal W_U, where it is attained: difference")
    generator = torch.Generator().manual_seed(43)
    for turn in range(rounds):
        for kind in ("rms_norm", "layer_norm"):
            for d in (1, 2, 3, 8):
                eps = EPS[turn % len(EPS)]
                norm = NormLayer(kind, eps, gain(("normal", "none", "zeros")[turn % 3], d, generator))
                head = _random(5, d, generator=generator)
                x, change = _random(2, 16, d, generator=generator)
                change = change * torch.logspace(-4, 3, 16, dtype=torch.float64)[:, None]
                moved = ((norm(x + change) - norm(x)) @ head.mT).norm(dim=-1)
                bound = _head_bound(norm, head, x, change)
                worst.update((moved - bound).clamp(min=0) / bound.clamp(min=1e-6), x, eps=eps)
                bare, turned = NormLayer(kind, eps), torch.linalg.qr(_random(d, d, generator=generator))[0]
                # A permutation of the entries keeps length and mean; so does reversal of x.
                for change in (x.roll(1, -1) - x, -2 * x):
                    moved = ((bare(x + change) - bare(x)) @ turned.mT).norm(dim=-1)
                    bound = _head_bound(bare, turned, x, change)
                    sharp.update((moved - bound).abs() / bound.clamp(min=1e-3), x, eps=eps)
    return [worst.evidence(), sharp.evidence()]


def spd_amdahl(rounds: int) -> list[Evidence]:
    """Count the operations of blocks and a head before and after the removal of every number of blocks."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(layers: list[Tensor], tokens: int) -> int:
        with FlopCounterMode(display=False) as counter:
            x = torch.ones(tokens, layers[0].shape[-1])
            for layer in layers:
                x = x @ layer.mT
        return counter.get_total_flops()

    worst = Worst("operations before over after, counted by torch, against 1/(1 - p b)")
    for depth, d, vocabulary in ((1, 2, 3), (4, 8, 100), (8, 6, 1), (24, 4, 50))[: max(1, rounds)]:
        block, head = torch.ones(d, d), torch.ones(vocabulary, d)
        whole = count([block] * depth + [head], 3)
        share = count([block] * depth, 3) / whole
        for removed in range(depth + 1):
            speedup = whole / count([block] * (depth - removed) + [head], 3)
            expected = 1 / (1 - removed / depth * share)
            where = torch.tensor([[depth, d, vocabulary, removed]])
            worst.update(torch.tensor([abs(speedup / expected - 1)], dtype=torch.float64), where)
    return [worst.evidence()]


PROPERTIES: dict[str, Property] = {
    "PRN-TELESCOPE": prn_telescope,
    "PRN-FIRST-ORDER": prn_first_order,
    "PRN-BOUND": prn_bound,
    "PRN-HEAD": prn_head,
    "SPD-AMDAHL": spd_amdahl,
}
