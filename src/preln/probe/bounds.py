"""The theory's bounds on Jacobian norms as functions of measured a = sigma(A) and g = sigma(G)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST = 1e300  # sums over sequences of numbers up to this one stay finite


@dataclass(frozen=True)
class BlockBounds:
    """Bounds on the Jacobian J of a block, one number a sequence.

    Attributes:
        block: Upper bound of sigma(J).
        update: Upper bound of sigma(J - I), or None where the claim makes none.
        smallest: Lower bound of every singular value of J, or None.
    """

    block: Float[Tensor, " b"]
    update: Float[Tensor, " b"] | None
    smallest: Float[Tensor, " b"] | None


def strength(a: Float[Tensor, " b"], *g: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``a g``, or ``g2 a g1`` with a norm on either side: a bound of the update of one half."""
    result = a.double()
    for factor in g:
        result = result * factor.double()
    return result


def blk_pre(halves: Sequence[Float[Tensor, " b"]]) -> BlockBounds:
    """BLK-PRE: halves of strength m_i = a_i g_i in a row, J = (I + M2)(I + M1) with ``|M_i| <= m_i``.

    ``sigma(J) <= prod(1 + m_i)``, ``sigma(J - I) <= prod(1 + m_i) - 1`` and every singular value is at least
    ``prod max(0, 1 - m_i)``.

    >>> found = blk_pre([torch.tensor([1.0]), torch.tensor([0.5])])
    >>> found.block.item(), found.update.item(), found.smallest.item()
    (3.0, 2.0, 0.0)
    """
    m = torch.stack([half.double() for half in halves])
    smallest = (1.0 - m).clamp_min(0.0).prod(dim=0)
    # by its terms: subtracting 1 from the product would lose the digits of small strengths
    update = torch.zeros_like(m[0])
    for half in m:
        update = update + half + update * half
    return BlockBounds((1.0 + m).prod(dim=0), update, smallest)


def blk_parallel(halves: Sequence[Float[Tensor, " b"]]) -> BlockBounds:
    """BLK-PARALLEL: branches side by side, J = I + M1 + M2 with ``|M_i| <= m_i = a_i g_i``.

    ``sigma(J) <= 1 + sum m_i``, ``sigma(J - I) <= sum m_i`` and every singular value is at least
    ``max(0, 1 - sum m_i)``. Behind one norm, give the single strength ``g sigma(A1 + A2)``.

    >>> found = blk_parallel([torch.tensor([0.5]), torch.tensor([0.25])])
    >>> found.block.item(), found.update.item(), found.smallest.item()
    (1.75, 0.75, 0.25)
    """
    total = torch.stack([half.double() for half in halves]).sum(dim=0)
    return BlockBounds(1.0 + total, total, (1.0 - total).clamp_min(0.0))


def blk_sandwich(halves: Sequence[Float[Tensor, " b"]]) -> BlockBounds:
    """BLK-SANDWICH for each half, ``m_i = g2 a g1``, and ``|XY| <= |X||Y|`` for halves in a row."""
    return blk_pre(halves)


def blk_after(halves: Sequence[Float[Tensor, " b"]]) -> BlockBounds:
    """BLK-AFTER for each half, ``m_i = g a`` with g at the branch's output; halves in a row as above."""
    return blk_pre(halves)


def blk_post(a: Sequence[Float[Tensor, " b"]], g: Sequence[Float[Tensor, " b"]]) -> BlockBounds:
    """BLK-POST for each half, ``J = G (I + A)``: ``sigma(J) <= prod g_i (1 + a_i)``.

    There is no identity path: nothing is said about J - I, and the smallest singular value may be 0.

    >>> blk_post([torch.tensor([1.0])], [torch.tensor([0.5])]).block.item()
    1.0
    """
    factors = [gi.double() * (1.0 + ai.double()) for ai, gi in zip(a, g, strict=True)]
    return BlockBounds(torch.stack(factors).prod(dim=0), None, None)


def weyl_smallest(update: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``max(0, 1 - sigma(J - I))``, a lower bound of every singular value of J (Weyl 1912)."""
    return (1.0 - update.double()).clamp_min(0.0)


def stk_upper(blocks: Sequence[Float[Tensor, " b"]]) -> Float[Tensor, "l b"]:
    """STK-UPPER: logarithms of ``prod_{k>=l} b_k`` for every l, from bounds b_k of the blocks' norms.

    As sums of logarithms, since the products leave the range of float64 in deep models.
    """
    logs = torch.stack([block.double() for block in blocks]).log()
    return logs.flip(0).cumsum(dim=0).flip(0)


def bounded_exp(logs: Tensor) -> Tensor:
    """``exp``, cut off at 1e300 so that means over sequences stay finite."""
    return logs.exp().clamp_max(_LARGEST)


def tightness(smaller: Tensor, larger: Tensor) -> Tensor:
    """``smaller/larger``; 1 where both are 0, since the bound is then attained."""
    smaller, larger = smaller.double(), larger.double()
    return torch.where(
        (smaller == 0) & (larger == 0), torch.ones_like(larger), smaller / larger.clamp_min(1e-300)
    )
