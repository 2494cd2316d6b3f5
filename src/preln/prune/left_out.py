"""The loss without one block, from the hidden state in front of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from preln.models.tail import Tail
from preln.prune.walk import Walk


@torch.no_grad()
def losses_without(walk: Walk, tail: Tail, index: int) -> Float[Tensor, "b t-1"]:
    """Next-token losses when x[index] goes straight into block ``index + 1``.

    Runs the blocks after ``index`` with the masks and positions of the walk, and what follows the blocks.
    """
    return tail.losses(walk.through(walk.states[index], range(index + 1, len(walk.blocks))), walk.part)


def loss_table(by_layer: dict[int, list[Tensor]], counts: Tensor) -> pd.DataFrame:
    """Mean loss of every sequence under every removal: layer, sequence, loss, tokens.

    Args:
        by_layer: Summed losses of the sequences of every batch.
        counts: Number of targets of every sequence.
    """
    losses = torch.stack([torch.cat(parts) for parts in by_layer.values()]).double() / counts
    columns = {
        "layer": np.repeat(list(by_layer), len(counts)),
        "sequence": np.tile(np.arange(len(counts)), len(by_layer)),
        "loss": losses.flatten().numpy(),
        "tokens": counts.repeat(len(by_layer)).numpy(),
    }
    return pd.DataFrame(columns)
