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
from preln.base.journal import next_stage
from preln.base.progress import track
from preln.models.residual import Tokens, on_blocks, undisturbed, wide
from preln.models.tail import Tail
from preln.models.through import run_blocks
from preln.prune.left_out import loss_table, losses_without
from preln.prune.visit import Visit
from preln.prune.walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from preln.base.checkpoints import State

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
    No number depends on the batch size. Within a journal the passes are one stage.

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
    stage = next_stage(f"score {' '.join(sorted(needs))}")
    with undisturbed(model, [p for group in trained for p in group]):
        passes = _Passes(request, found, needs, [p for group in trained for p in group])
        parts = request.parts()
        passes.restore(stage.restore())
        left = parts[passes.done :]
        for part in track(left, label="score", total=len(left)):
            passes.take(part)
            if passes.done < len(parts):
                stage.save(passes.done, passes.state, last=False)
        for index, group in enumerate(trained):
            found.taylor[index] += sum(
                float((wide(p.grad) * wide(p.detach())).abs().sum(dtype=torch.float64))
                for p in group
                if p.grad is not None
            )
            for p in group:
                p.grad = None
        stage.save(passes.done, passes.state, last=True)
    if "left_out" in needs:
        found.losses = loss_table(passes.losses, tokens.targets.sum(1).cpu())
    return found


_SUMS = ("gap", "empty", "squares", "across", "across_last", "adjacent_last", "damage", "taylor")


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
        self.done = 0

    def take(self, part: Tokens) -> None:
        """Forward, backward and left-out passes, as far as they are needed."""
        visit = Visit(part, self.found, self.needs)
        self.done += 1
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

    def state(self) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
        """What the sequence batches so far have left: sums, losses, and gradients of the weights."""
        sums = {name: torch.from_numpy(getattr(self.found, name)) for name in _SUMS}
        losses = {str(k): torch.cat(parts) for k, parts in self.losses.items() if parts}
        grads = {str(n): p.grad.cpu().contiguous() for n, p in enumerate(self.trained) if p.grad is not None}
        groups = {"sums": sums | {"post": torch.tensor(self.found.post, dtype=torch.float64)}}
        groups |= {name: group for name, group in (("losses", losses), ("grads", grads)) if group}
        return {"done": self.done}, groups

    def restore(self, stored: State | None) -> None:
        """Go on from a former :meth:`state`, if there is one."""
        if stored is None:
            return
        progress, groups = stored
        self.done = progress["done"]
        for name in _SUMS:
            setattr(self.found, name, groups["sums"][name].numpy())
        self.found.post = tuple(groups["sums"]["post"].tolist())
        self.losses |= {int(k): [losses] for k, losses in groups.get("losses", {}).items()}
        for n, gradient in groups.get("grads", {}).items():
            self.trained[int(n)].grad = gradient.to(self.trained[int(n)].device)

    def _keep(self, k: int, losses: Tensor) -> None:
        if not bool(torch.isfinite(losses).all()):
            place = "head" if k < 0 else f"without block {k}"
            raise InputError(f"{place}: the loss is not finite: check the weights, or use a wider --dtype")
        self.losses[k].append(losses.detach().sum(1).cpu())
