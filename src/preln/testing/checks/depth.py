"""Stacks of Pre-LN blocks on numbers: products of Jacobians, gradients by depth, growth (STK-*)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from preln.testing.cases import cases
from preln.testing.checks.branches import (
    WIDTH,
    Block,
    draw_stacks,
    hidden_states,
    multiple_of_identity,
    pre_norm_part,
    sequence_jacobian,
    smallest,
)
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import Property, Worst
from preln.theory import Evidence

DEPTH = 6


class Product(NamedTuple):
    """prod (I + A_k G_k), `[n, d, d]`, the a_k g_k so far, `[n, blocks]`, the norm layer and its input."""

    matrix: Tensor
    steps: Tensor
    layer: NormLayer
    x: Tensor


def products(*, seed: int, rounds: int, scale: float = 1.0) -> Iterator[Product]:
    """Multiply 1 to 6 blocks with random branches and the Jacobians of real norm layers."""
    generator = torch.Generator().manual_seed(seed)
    for layer, x in cases("rms_norm", seed=seed, rounds=rounds, gained=True):
        d = x.shape[-1]
        eye, norm, g = torch.eye(d, dtype=x.dtype), layer.jacobian(x), layer.sigma(x)
        total, steps = eye.expand(len(x), d, d), x.new_empty(len(x), 0)
        for _ in range(DEPTH):
            branch = scale * torch.randn(len(x), d, d, dtype=x.dtype, generator=generator)
            if scale < 1:
                # a g below `scale`, whatever the input: only then does a lower bound say anything.
                branch = branch / (dense_sigma(branch) * g / scale).clamp(min=1e-6)[:, None, None]
            total = (eye + branch @ norm) @ total
            steps = torch.cat([steps, (dense_sigma(branch) * g)[:, None]], -1)
            yield Product(total, steps, layer, x)


def multiples(rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield prod (I + c_k I), `[1, d, d]`, where bounds are attained, and its 1 to 6 factors c_k."""
    generator = torch.Generator().manual_seed(12)
    for turn in range(2 * rounds):
        c = torch.rand(1, 1 + turn % DEPTH, dtype=torch.float64, generator=generator)
        c = c if turn % 4 < 2 else -c
        yield (1 + c).prod() * torch.eye(1 + turn % 3, dtype=c.dtype)[None], c


def stk_upper(rounds: int) -> list[Evidence]:
    """Check prod (1 + a_k g_k), its exponential bound, and where the first is attained."""
    worst = Worst("dense sigma of products of 1 to 6 blocks: share by which the bound is exceeded")
    sharp = Worst("the same with A_k G_k = c_k I, c_k >= 0, where it is attained: difference")
    for total, steps, layer, x in products(seed=9, rounds=rounds):
        bound = (1 + steps).prod(-1)
        worst.update((dense_sigma(total) / bound - 1).clamp(min=0), x, eps=layer.eps, weight=layer.weight)
        worst.update((bound.log() - steps.sum(-1)).clamp(min=0), x, eps=layer.eps, weight=layer.weight)
    for total, c in multiples(rounds):
        if (c >= 0).all():
            sharp.update((dense_sigma(total) / (1 + c).prod(-1) - 1).abs(), c)
    return [worst.evidence(), sharp.evidence()]


def stk_lower(rounds: int) -> list[Evidence]:
    """Check prod max(0, 1 - a_k g_k) under the smallest singular value, and where it is attained."""
    worst = Worst("smallest singular value of products of 1 to 6 blocks: share by which it misses the bound")
    sharp = Worst("the same with A_k G_k = -c_k I, 0 <= c_k <= 1, where it is attained: difference")
    for scale in (0.1, 0.5, 0.99):
        for total, steps, layer, x in products(seed=13, rounds=max(1, rounds // 3), scale=scale):
            bound = (1 - steps).clamp(min=0).prod(-1)
            # The computed singular value is only good to rounding of the largest one.
            error = (bound - smallest(total)).clamp(min=0) / dense_sigma(total).clamp(min=1)
            worst.update(error, x, eps=layer.eps, weight=layer.weight)
    for total, c in multiples(rounds):
        if (c <= 0).all():
            sharp.update((smallest(total) - (1 - c.abs()).prod(-1)).abs(), c)
    return [worst.evidence(), sharp.evidence()]


def stk_tail(rounds: int) -> list[Evidence]:
    """Check |prod - I| <= prod (1 + a_k g_k) - 1 <= exp(sum a_k g_k) - 1, and where the first is attained."""
    worst = Worst("sigma(prod - I) of 1 to 6 blocks: share by which prod (1 + a g) - 1 is exceeded")
    outer = Worst("prod (1 + a g) - 1 against exp(sum a g) - 1: share by which it is exceeded")
    sharp = Worst("sigma(prod - I) with A_k G_k = c_k I, c_k >= 0, where it is attained: difference")
    for scale in (1e-4, 0.1, 1.0):
        for total, steps, layer, x in products(seed=14, rounds=max(1, rounds // 3), scale=scale):
            moved = dense_sigma(total - torch.eye(x.shape[-1], dtype=x.dtype))
            # expm1 and log1p: near the identity the 1 would swallow the digits.
            logs = steps.log1p().sum(-1)
            bound = logs.expm1()
            # total itself was stored beside 1, hence the 1 in what errors are relative to.
            worst.update((moved - bound).clamp(min=0) / bound.clamp(min=1), x, eps=layer.eps)
            outer.update((logs - steps.sum(-1)).clamp(min=0), x, eps=layer.eps)
    for total, c in multiples(rounds):
        if (c >= 0).all():
            moved = dense_sigma(total - torch.eye(total.shape[-1], dtype=c.dtype))
            sharp.update((moved - c.log1p().sum(-1).expm1()).abs() / (1 + moved), c)
    return [worst.evidence(), outer.evidence(), sharp.evidence()]


def _loss(head: Tensor, x: Tensor) -> Tensor:
    """Return one cross entropy a sequence, on the last token, with token 0 as the target."""
    return -(x[:, -1] @ head.mT).log_softmax(-1)[:, 0]


def _head() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(15))


def _hidden_gradients(blocks: list[Block], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return x_0 to x_L and dL/dx_0 to dL/dx_L by autograd, each `[n, T, d]`."""
    states = hidden_states(blocks, x.detach().clone().requires_grad_())
    gradients = torch.autograd.grad(_loss(_head(), states[-1]).sum(), states)
    return [s.detach() for s in states], list(gradients)


def stk_chain(rounds: int) -> list[Evidence]:
    """Multiply dense pieces in the order of the theorem; compare with backpropagation through the stack."""
    worst = Worst("autograd's dL/dtheta_l against dL/dx_L J_{L-1} ... J_{l+1} dx_{l+1}/dtheta_l")
    for blocks, x in draw_stacks(seed=16, rounds=rounds):
        x = x[2:3]  # one sequence: a block's parameters are shared by all of them
        thetas = [b.branch.weights.clone().requires_grad_() for b in blocks]
        live = [Block(b.norm, replace(b.branch, weights=t)) for b, t in zip(blocks, thetas, strict=True)]
        actual = torch.autograd.grad(_loss(_head(), hidden_states(live, x)[-1]).sum(), thetas)
        states, gradients = _hidden_gradients(blocks, x)
        jacobians = [_block_jacobian(b, state) for b, state in zip(blocks, states, strict=False)]
        for at, block in enumerate(blocks):
            row = pull_back(gradients[-1].flatten(-2)[:, None, :], jacobians[at + 1 :])
            expected = (row @ _parameter_jacobian(block, states[at]))[0, 0]
            size = max(float(expected.abs().max()), 1e-9)
            worst.update((expected - actual[at].flatten()).abs().max()[None] / size, x, layer=at)
    return [worst.evidence()]


def pull_back(row: Tensor, jacobians: list[Tensor]) -> Tensor:
    """Return row J_{L-1} ... J_{l+1}: the last block's Jacobian comes first."""
    for jacobian in reversed(jacobians):
        row = row @ jacobian
    return row


def _block_jacobian(block: Block, x: Tensor) -> Tensor:
    return sequence_jacobian(lambda z: z + block.update(z), x)


def _parameter_jacobian(block: Block, x: Tensor) -> Tensor:
    """Return dx_{l+1}/dtheta_l, `[1, T d, parameters]`."""
    weights = block.branch.weights

    def output(theta: Tensor) -> Tensor:
        branch = replace(block.branch, weights=theta[0].view_as(weights))
        return (x + branch(block.norm(x))).flatten(-2)

    return autograd_jacobian(output, weights.flatten()[None])


def stk_bound_monotone(rounds: int) -> list[Evidence]:
    """Measure gradients by depth on real stacks, against prod_{k >= l} (1 + a_k g_k)."""
    falls = Worst("the bound prod_{k>=l} (1 + a_k g_k) against its value at l + 1: shortfall")
    holds = Worst("|dL/dx_l| / |dL/dx_L| by autograd against that bound: share by which it is exceeded")
    sharp = Worst("the same at x = 0 with branches c I, c >= 0, where it is attained: difference")
    norm = NormLayer("rms_norm", 0.25)
    linear = [Block(norm, multiple_of_identity(c)) for c in (0.3, 0.0, 0.1, 0.7)]
    zero = torch.zeros(1, 3, WIDTH, dtype=torch.float64)
    stacks = [(b, x, holds) for b, x in draw_stacks(seed=17, rounds=rounds)] + [(linear, zero, sharp)]
    for blocks, x, worst in stacks:
        states, gradients = _hidden_gradients(blocks, x)
        lengths = [g.flatten(-2).norm(dim=-1) for g in gradients]
        bound = torch.ones_like(lengths[-1])
        for at in reversed(range(len(blocks))):
            p = pre_norm_part(blocks[at], states[at])
            before, bound = bound, bound * (1 + p.a * p.g)
            falls.update((before - bound).clamp(min=0) / before, x, layer=at)
            error = lengths[at] / lengths[-1] / bound - 1
            worst.update(error.abs() if worst is sharp else error.clamp(min=0), x, layer=at)
    return [falls.evidence(), holds.evidence(), sharp.evidence()]


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
        least = smallest(j).square() - 1 - torch.linalg.eigvalsh(form)[:, 0]
        criterion.update(least.abs() / (1 + dense_sigma(m)).square(), u)
    return [identity.evidence(), criterion.evidence()]


PROPERTIES: dict[str, Property] = {
    "STK-CHAIN": stk_chain,
    "STK-UPPER": stk_upper,
    "STK-LOWER": stk_lower,
    "STK-TAIL": stk_tail,
    "STK-BOUND-MONOTONE": stk_bound_monotone,
    "STK-GRADIENT-MONOTONE-PSD": stk_gradient_monotone_psd,
}
