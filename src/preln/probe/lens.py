"""The logit lens: what the model would say if its final norm and head came after any block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from preln.models.residual import Tokens
from preln.models.tail import Tail, cross_entropies
from preln.probe.masked import TokenSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("lens_loss", "lens_agreement")


class Lens:
    """Applies everything that follows the last block to every x[l] (nostalgebraist 2020).

    The loss at l is the loss of the model without blocks l, l + 1, …, L - 1: reverse-order pruning at every
    depth. What follows the blocks is run as the model itself runs it, so scaled or capped logits are right.
    It costs L + 1 heads, which for a small model with a large vocabulary is more than its blocks.
    """

    def __init__(self, model: PreTrainedModel, sums: TokenSums) -> None:
        self.sums = sums
        self._tail = Tail(model)

    @torch.no_grad()
    def reduce(self, tokens: Tokens, states: Sequence[Float[Tensor, "b t d"]]) -> None:
        """Add the sums of one sequence batch, from its states x[0] … x[L]."""
        real = tokens.real
        # the last token predicts nothing: whatever is compared with it there does not count
        ids, following = tokens.ids[real], tokens.ids.roll(-1, dims=1)[real]
        counts = torch.zeros_like(real)
        counts[:, :-1] = tokens.targets

        def loss_and_choice(logits: Tensor, rows: slice) -> Tensor:
            losses = cross_entropies(logits, following[rows])
            return torch.stack([losses, logits.argmax(dim=-1).to(losses)], dim=1)

        final: Tensor | None = None
        for layer in range(len(states) - 1, -1, -1):
            state = states[layer].detach()
            found = self._tail.reduce(state[real.to(state.device)], ids, loss_and_choice)
            losses = torch.zeros(real.shape, dtype=found.dtype, device=found.device)
            agrees = torch.zeros_like(losses)
            final = found[:, 1] if final is None else final
            losses[real.to(found.device)] = found[:, 0]
            agrees[real.to(found.device)] = (found[:, 1] == final).to(found.dtype)
            self.sums.mean("lens_loss", layer, "block", losses, where=counts.to(found.device))
            self.sums.mean("lens_agreement", layer, "block", agrees)
