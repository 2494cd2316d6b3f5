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
from preln.models import find_blocks
from preln.models.residual import (
    Tokens,
    change,
    check_finite,
    forward_losses,
    on_blocks,
    undisturbed,
    wide,
)
from preln.prune.left_out import losses_without

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = npt.NDArray[np.float64]
# what a criterion can ask for: statistics of the residual states, gradients at them, gradients of the
# weights, and the losses without each block
NEEDS = ("states", "gradients", "weight_gradients", "left_out")


@dataclass
class Evidence:
    """Sums over all calibration tokens, one entry a block.

    Attributes:
        blocks: The model's blocks.
        seed: For criteria that draw.
        tokens: Number of real tokens.
        gap: Sum over tokens of ``1 - cos(x[l], x[l+1])``.
        squares: ``[3, L]`` sums of ``|x[l]|^2``, ``|x[l+1]|^2`` and ``|x[l+1] - x[l]|^2``.
        damage: ``-<dL/dx[l+1], x[l+1] - x[l]>``, L the mean token loss.
        taylor: Sum over the block's weights of ``|g w|``.
        losses: layer (-1 is the whole model), sequence, loss, tokens; empty unless blocks were left out.
    """

    blocks: list[nn.Module]
    seed: int
    tokens: int
    gap: Array
    squares: npt.NDArray[np.float64]
    damage: Array
    taylor: Array
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)


def gather(
    model: PreTrainedModel, tokens: Tokens, needs: Collection[str], *, batch_size: int = 4, seed: int = 0
) -> Evidence:
    """Run the model over the tokens as often as ``needs`` requires, and no oftener.

    Per sequence batch: one forward pass; one backward pass if gradients are needed; and, if blocks are to be
    left out, for every block k the blocks after it and the head, from x[k] of that same forward pass. Only
    the present sequence batch's residual states are kept. No number depends on ``batch_size``.

    Raises:
        InputError: Values that are not finite, naming the block.
    """
    blocks = find_blocks(model)[1]
    count, total = len(blocks), int(tokens.targets.sum())
    zeros = np.zeros(count)
    found = Evidence(
        blocks, seed, int(tokens.real.sum()), zeros, np.zeros((3, count)), zeros.copy(), zeros.copy()
    )
    if not needs:
        return found
    weights, leave_out = "weight_gradients" in needs, "left_out" in needs
    backward = weights or "gradients" in needs
    trained = [
        [p for p in block.parameters() if p.is_floating_point()] if weights else [] for block in blocks
    ]
    flat = [p for group in trained for p in group]
    device = next(model.get_input_embeddings().parameters()).device
    passes = list(tokens.batches(batch_size, device))
    by_layer: dict[int, list[Tensor]] = {k: [] for k in range(-1, count)}
    left = [(part, k) for part in passes for k in range(-1, count if leave_out else 0)]
    states: list[Tensor] = []
    leaves: list[Tensor] = []
    with undisturbed(model, flat):
        for part, k in track(left, label="score", total=len(left)):
            if k >= 0:
                with torch.no_grad():
                    by_layer[k].append(losses_without(model, blocks, k, states[k], part).cpu())
                continue
            states.clear()
            leaves.clear()
            visit = _Visit(part, found, states if leave_out else None)
            with (
                torch.set_grad_enabled(backward),
                on_blocks(blocks, visit, leaf=leaves.append if backward else None),
            ):
                losses = forward_losses(model, part)
                if not bool(torch.isfinite(losses).all()):
                    raise InputError("head: the loss is not finite: check the weights, or the --dtype")
                if backward:
                    (losses.sum() / total).backward(inputs=[*leaves, *flat])
            by_layer[-1].append(losses.detach().sum(1).cpu())
        for index, group in enumerate(trained):
            found.taylor[index] = sum(
                float((wide(p.grad) * wide(p.detach())).abs().sum(dtype=torch.float64))
                for p in group
                if p.grad is not None
            )
    if leave_out:
        found.losses = _loss_table(by_layer, tokens.targets.sum(1).cpu())
    return found


def _loss_table(by_layer: dict[int, list[Tensor]], counts: Tensor) -> pd.DataFrame:
    """Mean loss of every sequence under every removal."""
    frames = []
    for layer, parts in by_layer.items():
        loss = (torch.cat(parts).double() / counts).numpy()
        columns = {"layer": layer, "sequence": np.arange(len(loss)), "loss": loss, "tokens": counts.numpy()}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


class _Visit:
    """Reduces the residual states of one sequence batch, and the gradients at them, into the evidence."""

    def __init__(self, part: Tokens, found: Evidence, states: list[Tensor] | None) -> None:
        self.part, self.found, self.states = part, found, states

    def __call__(self, layer: int, x: Tensor, y: Tensor) -> None:
        real = self.part.real.to(y.device)
        with torch.no_grad():
            moved = change(x.detach(), y.detach())
            check_finite(moved.before, real, f"input of block {layer}")
            check_finite(moved.after, real, f"block {layer}")
            self.found.gap[layer] += float(moved.gap[real].sum(dtype=torch.float64))
            for row, summed in enumerate(moved.squares(real)):
                self.found.squares[row, layer] += float(summed.sum(dtype=torch.float64))
        if self.states is not None:
            self.states.append(x.detach())
        if y.requires_grad:
            y.register_hook(lambda g: self._damage(layer, g, x, y, real))

    @torch.no_grad()
    def _damage(self, layer: int, g: Tensor, x: Tensor, y: Tensor, real: Tensor) -> None:
        per_token = -(wide(g) * (wide(y) - wide(x))).sum(-1)
        self.found.damage[layer] += float(per_token[real].sum(dtype=torch.float64))
