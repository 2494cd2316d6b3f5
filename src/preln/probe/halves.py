"""The branches of one block: their Jacobians, the exact norms around them, and the block's bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.linops import LinearOperator, compose, jacobian_operator, restricted
from preln.models.interventions import Branch, BranchError, branch_map, record
from preln.probe.bounds import (
    BlockBounds,
    blk_after,
    blk_parallel,
    blk_post,
    blk_pre,
    blk_sandwich,
    strength,
)
from preln.probe.norms import NormLaw, recognise
from preln.probe.spectra import Lanczos, Rows, upper

if TYPE_CHECKING:
    from preln.models.placement import Call

AGREES = 1e-3  # relative difference up to which branches and norms put together are the block's Jacobian


@dataclass(frozen=True)
class Place:
    """Where a measurement takes place: a block, its call on this sequence batch, and the real tokens.

    Attributes:
        block: The block.
        call: Its captured call.
        placement: Its measured norm placement.
        real: Mask of the real tokens, ``[b, t]``.
        padded: Whether any token is not real.
    """

    block: nn.Module
    call: Call
    placement: str
    real: Tensor
    padded: bool

    def restrict(self, operator: LinearOperator) -> LinearOperator:
        """The operator on the real tokens only."""
        return restricted(operator, self.real[..., None]) if self.padded else operator


@dataclass(frozen=True)
class Half:
    """Operators of one branch and of the norms around it, on whole sequences."""

    branch: Branch
    jacobian: LinearOperator
    before: LinearOperator | None
    after: LinearOperator | None

    @property
    def update(self) -> LinearOperator:
        """``G2 A G1``, without the norms that are not there."""
        return compose(*[op for op in (self.after, self.jacobian, self.before) if op is not None])


def laws_of(branches: list[Branch], width: int) -> dict[nn.Module, NormLaw] | None:
    """The formula of every norm around the branches; None if one of them follows none."""
    try:
        return {norm: recognise(norm, width) for branch in branches for norm in branch.norms}
    except InputError:
        return None


def largest_norm_sigma(law: NormLaw, h: Tensor, real: Tensor) -> Tensor:
    """g: the largest exact sigma of a norm over the real tokens of every sequence, ``[b]`` (BLK-TOKENS)."""
    sigma = law.sigma(h.detach()).view(real.shape)
    return torch.where(real.to(sigma.device), sigma, 0.0).amax(dim=1).double()


def _follow(placement: str, half: Half, v: Tensor, moved: Tensor) -> Tensor:
    """``moved``, which starts as v, after one more half of the block as the placement composes them."""
    if placement == "parallel":
        return moved + half.update.matvec(v)
    if placement == "post-ln" and half.after is not None:
        return half.after.matvec(moved + half.jacobian.matvec(moved))
    return moved + half.update.matvec(moved)


class Halves:
    """Measures the branches of one block on one sequence batch.

    Args:
        place: The block.
        branches: Its branches.
        laws: Formulas of the norms around them, or None: then no bound is made.
        lanczos: How spectral norms are found.
    """

    def __init__(
        self, place: Place, branches: list[Branch], laws: dict[nn.Module, NormLaw] | None, lanczos: Lanczos
    ) -> None:
        self.place, self.branches, self.laws, self.lanczos = place, branches, laws, lanczos
        watched = [m for b in branches for m in (b.begin, b.held, *b.norms) if m is not None]
        self.seen = record(place.block, place.call, watched)
        self._a: list[Tensor] = []
        self._g: list[list[Tensor]] = []
        self._shared = any(branch.site == "block" for branch in branches)

    def _half(self, branch: Branch) -> Half:
        run, point = branch_map(self.place.block, self.place.call, branch, self.seen)
        try:
            jacobian = jacobian_operator(run, point, batch=1)
        except InputError as error:  # the block as a whole is differentiable: this was seen before
            raise BranchError(f"the {branch.site} branch does not reach its end") from error
        inputs = self.seen.trace.inputs
        before, after = (
            None if norm is None else jacobian_operator(norm, inputs[norm].view(point.shape), batch=1)
            for norm in (branch.before, branch.after)
        )
        return Half(branch, jacobian, before, after)

    def measure(self, rows: Rows, jacobian: LinearOperator, wanted: set[str]) -> Tensor:
        """Rows of all branches; returns ``|J v - v'|/|J v|`` for a random v, ``[b]``.

        v' puts branches and norms together as the placement says: where it is not J v, the placement does not
        describe this block.

        Args:
            rows: Where values go; not committed here.
            jacobian: The block's Jacobian, restricted to real tokens.
            wanted: Measures.

        Raises:
            BranchError: A branch is not where the placement says.
        """
        generator = torch.Generator().manual_seed(self.lanczos.seed)
        shape, like = jacobian.in_shape, {"device": jacobian.device, "dtype": jacobian.dtype}
        v = torch.randn(shape[1:], generator=generator, dtype=torch.float64).to(**like).expand(shape)
        v = v if jacobian.project is None else jacobian.project(v)
        moved = v
        for branch in self.branches:
            half = self._half(branch)
            if branch.site != "block":
                moved = _follow(self.place.placement, half, v, moved)
            self._measure_half(rows, half, wanted)
        true = jacobian.matvec(v).flatten(1)
        if jacobian.project is not None:
            moved = jacobian.project(moved)
        off = torch.linalg.vector_norm(true - moved.flatten(1), dim=1)
        return (off / torch.linalg.vector_norm(true, dim=1).clamp_min(1e-30)).double()

    def _measure_half(self, rows: Rows, half: Half, wanted: set[str]) -> None:
        site = half.branch.site
        updates = "update_sigma" in wanted and site != "block" and self.place.placement != "post-ln"
        # behind one norm the block's bound needs both branches together only
        for_block = self.laws is not None and (site == "block" or not self._shared)
        if "branch_sigma" in wanted or for_block or (updates and self.laws is not None):
            triple = self.lanczos.largest(self.place.restrict(half.jacobian))
            if "branch_sigma" in wanted:
                rows.largest("branch_sigma", site, triple)
            self._a.append(upper(triple))
            if self.laws is not None:
                inputs = self.seen.trace.inputs
                self._g.append(
                    [largest_norm_sigma(self.laws[n], inputs[n], self.place.real) for n in half.branch.norms]
                )
        if updates:
            triple = self.lanczos.largest(self.place.restrict(half.update))
            rows.largest("update_sigma", site, triple)
            if self.laws is not None:
                rows.bound("update_sigma", site, triple.sigma, strength(self._a[-1], *self._g[-1]))

    def bounds(self) -> BlockBounds | None:
        """The block's bounds from what :meth:`measure` found, by the claim of its placement."""
        if self.laws is None or not self._a:
            return None
        placement = self.place.placement
        if placement == "post-ln":
            return blk_post(self._a, [g[-1] for g in self._g])
        strengths = [strength(a, *g) for a, g in zip(self._a, self._g, strict=True)]
        claims = {
            "pre-ln": blk_pre,
            "parallel": blk_parallel,
            "sandwich": blk_sandwich,
            "norm-after-branch": blk_after,
        }
        return claims[placement](strengths[-1:] if self._shared else strengths)
