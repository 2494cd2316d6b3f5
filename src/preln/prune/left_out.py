"""The loss without one block, from the hidden state in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import view
from preln.models.residual import Tokens, forward_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stored(nn.Module):
    """Stands where blocks were: returns a stored hidden state whatever comes in."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The stored state."""
        return self.state


def losses_without(
    model: PreTrainedModel,
    blocks: list[nn.Module],
    index: int,
    state: Float[Tensor, "b t d"],
    tokens: Tokens,
) -> Float[Tensor, " b"]:
    """Summed next-token losses of each sequence when x[index] goes straight into block ``index + 1``.

    Runs the blocks after ``index``, the final norm and the head, with whatever the architecture does around
    them, since a stand-in block returns ``state``.

    Raises:
        InputError: The loss is not finite.
    """
    losses = forward_losses(view(model, [Stored(state), *blocks[index + 1 :]]), tokens)
    if not bool(torch.isfinite(losses).all()):
        raise InputError(f"without block {index}: the loss is not finite: check the weights, or the --dtype")
    return losses.sum(1)
