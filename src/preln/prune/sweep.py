"""The loss at every depth of reverse-order pruning, from one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.progress import track
from preln.models.residual import on_blocks, undisturbed
from preln.models.tail import Tail
from preln.models.through import run_blocks
from preln.prune.left_out import loss_table
from preln.prune.scores import make_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def depth_sweep(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
) -> pd.DataFrame:
    """Loss of every sequence when block l and all later ones are gone, for every l.

    Without its last blocks a model does what it did up to x[l], and then what follows its blocks: one forward
    pass and a head for every depth give all of them (PRN-TELESCOPE). The same losses are the logit lens of
    :func:`preln.probe`.

    Args:
        model: A causal model.
        batch: Tokens.
        attention_mask: 1 for real tokens; None if all are.
        batch_size: Sequences in one pass; no loss depends on it.

    Returns:
        layer (blocks ``layer`` … L - 1 are gone; L is the whole model, 0 leaves the embedding alone),
        sequence, loss (mean over the sequence's targets, nats), tokens (the number of its targets).

    Raises:
        InputError: Bad tokens, or a loss that is not finite.
    """
    request = make_request(model, batch, attention_mask, batch_size=batch_size)
    blocks = request.blocks
    losses: dict[int, list[Tensor]] = {layer: [] for layer in range(len(blocks) + 1)}
    with undisturbed(model):
        tail = Tail(model, block=blocks[0])
        parts = request.parts()
        for part in track(parts, label="depth sweep", total=len(parts)):

            def lens(layer: int, state: Tensor, part=part) -> None:
                found = tail.losses(state, part)
                if not bool(torch.isfinite(found).all()):
                    raise InputError(f"from block {layer} on: the loss is not finite: check the weights")
                losses[layer].append(found.sum(1).cpu())

            with on_blocks(blocks, lambda layer, x, _, lens=lens: lens(layer, x)):
                final, _ = run_blocks(model, blocks, part)
            lens(len(blocks), final)
    return loss_table(losses, request.tokens.targets.sum(1).cpu())
