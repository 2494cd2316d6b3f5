"""The logit lens: what the model would say if its final norm and head came after any block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from preln.models import losses_from_logits, view
from preln.models.residual import Tokens, model_inputs
from preln.probe.masked import TokenSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("lens_loss", "lens_agreement")


class _Given(nn.Module):
    """Stands in for all blocks: whatever comes in, a stored state comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        """The stored state."""
        return self.state


class Lens:
    """Applies everything that follows the last block to every x[l] (nostalgebraist 2020).

    The loss at l is the loss of the model without blocks l, l + 1, …, L - 1: reverse-order pruning at every
    depth. What follows the blocks is run as the model itself runs it, so scaled or capped logits are right.
    It costs L + 1 heads, which for a small model with a large vocabulary is more than its blocks.
    """

    def __init__(self, model: PreTrainedModel, sums: TokenSums) -> None:
        self.sums = sums
        self._given = _Given()
        self._tail = view(model, [self._given])

    @torch.no_grad()
    def reduce(self, tokens: Tokens, states: Sequence[Float[Tensor, "b t d"]]) -> None:
        """Add the sums of one sequence batch, from its states x[0] … x[L]."""
        final = None
        for layer in range(len(states) - 1, -1, -1):
            self._given.state = states[layer].detach()
            logits = self._tail(**model_inputs(self._tail, tokens)).logits
            choice = logits.argmax(dim=-1)
            final = choice if final is None else final
            # the last position predicts nothing
            losses = F.pad(losses_from_logits(logits, tokens.ids), (0, 1))
            counts = F.pad(tokens.targets, (0, 1)).to(losses.device)
            self.sums.mean("lens_loss", layer, "block", losses, where=counts)
            self.sums.mean("lens_agreement", layer, "block", (choice == final).to(losses.dtype))
        self._given.state = None
