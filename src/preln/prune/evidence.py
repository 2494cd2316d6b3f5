"""What the criteria read, gathered in passes that they share: each is made once, and only when needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.base.progress import track
from preln.models.residual import Change, Tokens, change, check_finite, on_blocks, undisturbed, wide
from preln.models.tail import Tail
from preln.models.through import run_blocks
from preln.prune.angles import angles
from preln.prune.left_out import loss_table, losses_without
from preln.prune.walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = npt.NDArray[np.float64]
# what a criterion can ask for: statistics of the residual states, angles across windows of blocks at the last
# token or at all tokens, the last block against the final norm's output, gradients at the states, gradients
# of the weights, and the losses without each block
NEEDS = (
    "states",
    "windows",
    "token_windows",
    "post_norm",
    "gradients",
    "weight_gradients",
    "left_out",
    "jacobians",
)


@dataclass(frozen=True)
class Request:
    """What is asked of criteria.

    Attributes:
        model: A causal model.
        tokens: The calibration tokens.
        batch_size: Sequences in one pass; no score depends on it.
        seed: For criteria that draw.
        size: How many blocks are to go.
        spared: Blocks that may not go.
        blocks: The model's blocks.
    """

    model: PreTrainedModel
    tokens: Tokens
    batch_size: int
    seed: int
    size: int
    spared: frozenset[int]
    blocks: list[nn.Module]

    def parts(self) -> list[Tokens]:
        """The sequence batches, on the device of the embedding."""
        device = next(self.model.get_input_embeddings().parameters()).device
        return list(self.tokens.batches(self.batch_size, device))


@dataclass
class Evidence:
    """Sums over all calibration tokens, one entry a block.

    Attributes:
        blocks: The model's blocks.
        seed: For criteria that draw.
        size: How many blocks are to go.
        spared: Blocks that may not go.
        tokens: Number of real tokens.
        sequences: Number of sequences.
        gap: Sum over tokens of ``1 - cos(x[l], x[l+1])``.
        empty: Number of tokens at which x[l] or x[l+1] is zero: there the gap counts as 1.
        post: Gap and empty tokens of x[L-1] against the final norm's output.
        squares: ``[3, L]`` sums of ``|x[l]|^2``, ``|x[l+1]|^2`` and ``|x[l+1] - x[l]|^2``.
        across: Sum over tokens of the angle between x[l] and x[l+size], over pi, ``[L - size + 1]``.
        across_last: The same at the last tokens.
        adjacent_last: The angle between x[l] and x[l+1], over pi, summed over the last tokens.
        damage: ``-<dL/dx[l+1], x[l+1] - x[l]>``, L the mean token loss.
        taylor: Sum over the block's weights of ``|g w|``.
        losses: layer (-1 is the whole model), sequence, loss, tokens; empty unless blocks were left out.
    """

    blocks: list[nn.Module]
    seed: int
    size: int
    spared: frozenset[int]
    tokens: int
    sequences: int
    gap: Array = field(init=False)
    empty: Array = field(init=False)
    post: tuple[float, float] = (0.0, 0.0)
    squares: npt.NDArray[np.float64] = field(init=False)
    across: Array = field(init=False)
    across_last: Array = field(init=False)
    adjacent_last: Array = field(init=False)
    damage: Array = field(init=False)
    taylor: Array = field(init=False)
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        count = self.num_blocks
        for name in ("gap", "empty", "damage", "taylor", "adjacent_last"):
            setattr(self, name, np.zeros(count))
        self.squares = np.zeros((3, count))
        self.across, self.across_last = np.zeros((2, count - self.size + 1))

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)


def gather(request: Request, needs: Collection[str]) -> Evidence:
    """Run the model over the tokens as often as ``needs`` requires, and no oftener.

    Per sequence batch: one forward pass, with the head only where losses are needed, in chunks; one backward
    pass if gradients are; and, if blocks are to be left out, for every block k the blocks after it and the
    head, from x[k] of that same forward pass. Only the present sequence batch's residual states are kept.
    No number depends on the batch size.

    Raises:
        InputError: Values that are not finite, naming the block.
    """
    model, tokens, blocks = request.model, request.tokens, request.blocks
    found = Evidence(
        blocks, request.seed, request.size, request.spared, int(tokens.real.sum()), len(tokens.ids)
    )
    if not needs:
        return found
    weights = "weight_gradients" in needs
    trained = [
        [p for p in block.parameters() if p.is_floating_point()] if weights else [] for block in blocks
    ]
    with undisturbed(model, [p for group in trained for p in group]):
        passes = _Passes(request, found, needs, [p for group in trained for p in group])
        parts = request.parts()
        for part in track(parts, label="score", total=len(parts)):
            passes.take(part)
        for index, group in enumerate(trained):
            found.taylor[index] = sum(
                float((wide(p.grad) * wide(p.detach())).abs().sum(dtype=torch.float64))
                for p in group
                if p.grad is not None
            )
    if "left_out" in needs:
        found.losses = loss_table(passes.losses, tokens.targets.sum(1).cpu())
    return found


class _Passes:
    """The passes over one sequence batch after the other."""

    def __init__(
        self, request: Request, found: Evidence, needs: Collection[str], trained: list[nn.Parameter]
    ) -> None:
        self.model, self.found, self.needs, self.trained = request.model, found, needs, trained
        self.total = int(request.tokens.targets.sum())
        self.tail = Tail(request.model, block=request.blocks[0])
        self.leave_out = "left_out" in needs
        self.backward = bool({"gradients", "weight_gradients"} & set(needs))
        self.losses: dict[int, list[Tensor]] = {k: [] for k in range(-1, found.num_blocks)}

    def take(self, part: Tokens) -> None:
        """Forward, backward and left-out passes, as far as they are needed."""
        visit = _Visit(part, self.found, self.needs)
        leaves: list[Tensor] = []
        blocks = self.found.blocks
        with (
            torch.set_grad_enabled(self.backward),
            on_blocks(blocks, visit, leaf=leaves.append if self.backward else None),
        ):
            final, calls = run_blocks(self.model, blocks, part)
        if "post_norm" in self.needs:
            visit.against_post_norm(self.tail, final.detach())
        if self.backward:
            losses, slope = self.tail.losses_and_gradient(final, part, self.total)
            self._keep(-1, losses)
            final.backward(slope, inputs=[*leaves, *self.trained])
        elif self.leave_out:
            with torch.no_grad():
                self._keep(-1, self.tail.losses(final, part))
        if self.leave_out:
            walk = Walk(part, blocks, calls, [x.detach() for x in visit.states])
            for k in range(len(blocks)):
                self._keep(k, losses_without(walk, self.tail, k))

    def _keep(self, k: int, losses: Tensor) -> None:
        if not bool(torch.isfinite(losses).all()):
            place = "head" if k < 0 else f"without block {k}"
            raise InputError(f"{place}: the loss is not finite: check the weights, or use a wider --dtype")
        self.losses[k].append(losses.detach().sum(1).cpu())


def _sums(moved: Change, real: Tensor) -> tuple[float, int]:
    """The gap summed over real tokens, and at how many of them one of the two states is zero."""
    empty = (moved.before * moved.after == 0) & real
    return float(moved.gap[real].sum(dtype=torch.float64)), int(empty.sum())


class _Visit:
    """Reduces the residual states of one sequence batch, and the gradients at them, into the evidence."""

    def __init__(self, part: Tokens, found: Evidence, needs: Collection[str]) -> None:
        self.part, self.found, self.needs = part, found, needs
        self.keep = "left_out" in needs
        self.ahead = found.size if {"windows", "token_windows"} & set(needs) else 1
        # x[0] … x[L] where all are kept, else those that a window still needs
        self.states: list[Tensor] = []

    def __call__(self, layer: int, x: Tensor, y: Tensor) -> None:
        real = self.part.real.to(y.device)
        with torch.no_grad():
            if "states" in self.needs:
                self._statistics(layer, change(x.detach(), y.detach()), real)
            else:
                check_finite(torch.linalg.vector_norm(wide(y.detach()), dim=-1), real, f"block {layer}")
            self._window(layer, x.detach(), y.detach(), real)
        if y.requires_grad:
            y.register_hook(lambda g: self._damage(layer, g, x, y, real))

    def _statistics(self, layer: int, moved: Change, real: Tensor) -> None:
        check_finite(moved.before, real, f"input of block {layer}")
        check_finite(moved.after, real, f"block {layer}")
        gap, empty = _sums(moved, real)
        self.found.gap[layer] += gap
        self.found.empty[layer] += empty
        for row, summed in enumerate(moved.squares(real)):
            self.found.squares[row, layer] += float(summed.sum(dtype=torch.float64))

    def _window(self, layer: int, x: Tensor, y: Tensor, real: Tensor) -> None:
        """Angles across the windows that end behind this block."""
        if not self.states:
            self.states.append(x)
        self.states.append(y)
        start = layer + 1 - self.ahead
        if "windows" in self.needs:
            last = self.part.last.to(y.device)
            rows = torch.arange(len(last), device=y.device)
            ends = [s.to(y.device)[rows, last].double() for s in (x, y)]
            self.found.adjacent_last[layer] += float(angles(*ends).sum())
            if start >= 0:
                first = self.states[-1 - self.ahead].to(y.device)[rows, last].double()
                self.found.across_last[start] += float(angles(first, ends[1]).sum())
        if "token_windows" in self.needs and start >= 0:
            across = angles(self.states[-1 - self.ahead].to(y.device), y)
            self.found.across[start] += float(across[real].sum(dtype=torch.float64))
        if not self.keep:
            self.states = self.states[-1 - self.ahead :]

    def against_post_norm(self, tail: Tail, final: Tensor) -> None:
        """The last block's update as seen behind the final norm."""
        real = self.part.real.to(final.device)
        before = self.states[-2]
        with torch.no_grad():
            after = tail.normed(final[real], self.part.ids[self.part.real])
            moved = change(before.to(after.device)[real.to(after.device)][None], after[None])
        gap, empty = _sums(moved, torch.ones_like(moved.before, dtype=torch.bool))
        self.found.post = (self.found.post[0] + gap, self.found.post[1] + empty)

    @torch.no_grad()
    def _damage(self, layer: int, g: Tensor, x: Tensor, y: Tensor, real: Tensor) -> None:
        per_token = -(wide(g) * (wide(y) - wide(x))).sum(-1)
        self.found.damage[layer] += float(per_token[real].sum(dtype=torch.float64))
