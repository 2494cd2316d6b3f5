"""The walk over a model's blocks, and then their stack, that measures Jacobian norms on a sequence batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.linops import LinearOperator, SingularTriple, compose, jacobian_operator, minus_identity
from preln.models import Anatomy
from preln.models.interventions import BranchError, branches_of
from preln.models.maps import (
    block_map,
    capture_calls,
    hidden_input,
    placement_of,
)
from preln.models.precision import widen, widened
from preln.models.residual import Tokens
from preln.probe.bounds import BlockBounds, bounded_exp, stk_upper, weyl_smallest
from preln.probe.halves import AGREES, Halves, Place, laws_of
from preln.probe.norms import NormLaw
from preln.probe.spectra import Lanczos, Rows, upper
from preln.probe.sums import Sums

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from preln.base.checkpoints import Checkpoints, State
    from preln.models.interventions import Branch
    from preln.models.placement import Call

_LOG10 = 2.302585092994046


@dataclass(frozen=True)
class _Block:
    """What is kept of a block until the stack has been measured."""

    jacobian: LinearOperator
    top: SingularTriple | None
    bounds: BlockBounds | None


class JacobianProbe:
    """Measures one model; remembers from batch to batch which blocks their placement describes."""

    def __init__(
        self, model: PreTrainedModel, found: Anatomy, wanted: set[str], lanczos: Lanczos, *, bounds: bool
    ) -> None:
        self.model, self.found, self.wanted, self.lanczos, self.bounds = model, found, wanted, lanczos, bounds
        self.width = model.config.get_text_config().hidden_size
        self.sums = Sums()
        self.left_out: dict[int, str] = {}
        self._laws: dict[int, dict[nn.Module, NormLaw] | None] = {}
        self._explained: set[int] = set()
        self.done = 0

    def batch(self, tokens: Tokens) -> None:
        """Measure every block, then the stack, on one sequence batch."""
        stack = "stack_sigma" in self.wanted
        calls = capture_calls(self.model, self.found, tokens, check_stream=stack)
        blocks: list[_Block] = []
        with ExitStack() as kept:
            if stack:
                kept.enter_context(widened(self.found.blocks))
            for layer, call in enumerate(calls):
                with named(f"block {layer}"):
                    measured = self._block(layer, call, tokens)
                if stack:
                    blocks.append(measured)
            if stack:
                with named("stack"):
                    self._stack(blocks)
        self.sums.flush()
        self.done += 1

    def save(self, checkpoints: Checkpoints) -> None:
        """Store what the batches so far have left."""
        keys, tensors = self.sums.state()
        left_out = {str(layer): reason for layer, reason in self.left_out.items()}
        progress = {"keys": keys, "left_out": left_out, "explained": sorted(self._explained)}
        checkpoints.save(self.done, progress | {"done": self.done}, {"sums": tensors})

    def restore(self, stored: State) -> None:
        """Go on from what :meth:`save` stored."""
        progress, groups = stored
        self.sums.restore(progress["keys"], groups["sums"])
        self.left_out = {int(layer): reason for layer, reason in progress["left_out"].items()}
        self._explained, self.done = set(progress["explained"]), progress["done"]

    def _block(self, layer: int, call: Call, tokens: Tokens) -> _Block:
        block = self.found.blocks[layer]
        with widened([block]):
            call = widen(call)
            placement, hidden = placement_of(self.found, layer), hidden_input(call)
            place = Place(block, call, placement, tokens.real.to(hidden.device), tokens.padded)
            jacobian = place.restrict(jacobian_operator(block_map(block, call), hidden, batch=1))
            bounds = self._halves(layer, place, jacobian)
            rows = Rows(self.sums, layer)
            update = self._update(rows, jacobian, bounds) if "update_sigma" in self.wanted else None
            top = self._whole(rows, jacobian, bounds, update)
            rows.commit()
        return _Block(jacobian, top, bounds)

    def _halves(self, layer: int, place: Place, jacobian: LinearOperator) -> BlockBounds | None:
        """Rows of the branches, and the block's bounds if its placement explains its Jacobian."""
        if layer in self.left_out or not (self.bounds or self.wanted & {"branch_sigma", "update_sigma"}):
            return None
        branches = branches_of(place.block, self.found.parts(layer), place.placement)
        if not branches:
            self.left_out[layer] = f"the branches of a {place.placement} block were not found"
            return None
        rows = Rows(self.sums, layer)
        halves = Halves(place, branches, self._laws_of(layer, branches), self.lanczos)
        try:
            error = halves.measure(rows, jacobian, self.wanted)
            worst = float(error.max())
            reason = f"branches and norms put together as {place.placement} miss its Jacobian by {worst:.1e}"
        except BranchError as missing:
            worst, reason = float("inf"), str(missing)
        if not worst <= AGREES:
            if layer in self._explained:
                raise InputError(f"{reason}, though not on earlier sequences: leave its branches out")
            self.left_out[layer] = reason
            return None
        self._explained.add(layer)
        rows.put("branch_decomposition_error", "block", error)
        rows.commit()
        return halves.bounds()

    def _laws_of(self, layer: int, branches: list[Branch]) -> dict[nn.Module, NormLaw] | None:
        if self.bounds and layer not in self._laws:
            self._laws[layer] = laws_of(branches, self.width)
        return self._laws.get(layer)

    def _update(self, rows: Rows, jacobian: LinearOperator, bounds: BlockBounds | None) -> SingularTriple:
        triple = self.lanczos.largest(minus_identity(jacobian))
        rows.largest("update_sigma", "block", triple)
        if bounds is not None and bounds.update is not None:
            rows.bound("update_sigma", "block", triple.sigma, bounds.update)
        return triple

    def _whole(
        self, rows: Rows, jacobian: LinearOperator, bounds: BlockBounds | None, update: SingularTriple | None
    ) -> SingularTriple | None:
        """Rows of J itself, both ends of its spectrum from one bidiagonalisation."""
        product = self.bounds and "stack_sigma" in self.wanted
        if not (product or self.wanted & {"block_sigma", "block_sigma_min"}):
            return None
        top, bottom = self.lanczos.extremes(jacobian, both="block_sigma_min" in self.wanted)
        if "block_sigma" in self.wanted:
            rows.largest("block_sigma", "block", top)
            if bounds is not None:
                rows.bound("block_sigma", "block", top.sigma, bounds.block)
        if "block_sigma_min" in self.wanted:
            rows.smallest("block_sigma_min", "block", bottom, top)
            lower = [] if bounds is None or bounds.smallest is None else [bounds.smallest]
            if self.bounds and update is not None:
                good = update.residual <= self.lanczos.rtol * update.sigma
                lower.append(torch.where(good, weyl_smallest(upper(update)), 0.0))
            if lower:
                best = torch.stack(lower).amax(dim=0)
                rows.bound("block_sigma_min", "block", bottom.sigma, best, below=True)
        return top

    def _stack(self, blocks: list[_Block]) -> None:
        """The spectral norms of x[l] -> x[L].

        Every l starts from the random vector. The left vector of the stack above, pulled through block l, is
        close to the right vector sought and saves a fifth of the products; but it outweighs the random part
        so far that the residual can stop at the second singular value before the first shows.
        """
        sigmas = []
        for layer, block in enumerate(blocks):
            if layer == len(blocks) - 1 and block.top is not None:
                sigmas.append(block.top)  # the last stack is the last block
                continue
            operator = compose(*[above.jacobian for above in reversed(blocks[layer:])])
            sigmas.append(self.lanczos.largest(operator))
        products, limits = self._stack_limits(blocks)
        for layer, triple in enumerate(sigmas):
            rows = Rows(self.sums, layer)
            rows.largest("stack_sigma", "block", triple)
            if products is not None:
                rows.put("stack_sigma_product", "block", bounded_exp(products[layer]))
            if limits is not None and layer >= len(blocks) - len(limits):
                log = limits[layer - len(blocks)]
                over = log - triple.sigma.double().clamp_min(1e-300).log()
                rows.put("stack_sigma_bound", "block", bounded_exp(log))
                rows.put("stack_sigma_tightness", "block", (-over).exp())
                rows.put("stack_sigma_log10_overestimate", "block", over / _LOG10)
            rows.commit()

    def _stack_limits(self, blocks: list[_Block]) -> tuple[Tensor | None, Tensor | None]:
        """Logarithms of the products of measured norms and of bounds; the latter as far down as known."""
        tops = [upper(block.top) for block in blocks if block.top is not None]
        bounds: list[Tensor] = []
        for block in reversed(blocks):
            if block.bounds is None:
                break
            bounds.insert(0, block.bounds.block)
        return (
            stk_upper(tops) if self.bounds and len(tops) == len(blocks) else None,
            stk_upper(bounds) if bounds else None,
        )


@contextmanager
def named(place: str) -> Iterator[None]:
    """Say in an error where it arose."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
