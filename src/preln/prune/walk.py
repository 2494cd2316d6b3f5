"""One sequence batch inside the stack: the state in front of every block, and any block on any state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preln.models import replay
from preln.models.placement import Call
from preln.models.residual import Tokens, check_finite, on_blocks
from preln.models.through import run_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Walk:
    """The calls of all blocks on one sequence batch, and the states between them.

    Attributes:
        part: The sequence batch.
        blocks: The model's blocks.
        calls: Arguments of every block.
        states: x[0] … x[L]; empty where they were not kept.
    """

    part: Tokens
    blocks: Sequence[nn.Module]
    calls: list[Call]
    states: list[Tensor] = field(default_factory=list)

    def through(self, state: Float[Tensor, "b t d"], indices: Iterable[int]) -> Float[Tensor, "b t d"]:
        """The state behind the blocks ``indices``, in this order."""
        for index in indices:
            state = replay(self.blocks[index], self.calls[index], state)
        return state


@torch.no_grad()
def walk(model: PreTrainedModel, blocks: Sequence[nn.Module], part: Tokens) -> Walk:
    """One pass over a sequence batch that keeps its states, ``(L + 1) b t d`` numbers, and makes no logits.

    Raises:
        InputError: Values that are not finite, naming the block, or blocks that are no residual stack.
    """
    states: list[Tensor] = []

    def keep(layer: int, x: Tensor, y: Tensor) -> None:
        check_finite(y.float().norm(dim=-1), part.real.to(y.device), f"block {layer}")
        states.append(x)

    with on_blocks(blocks, keep):
        final, calls = run_blocks(model, blocks, part)
    return Walk(part, blocks, calls, [*states, final])
