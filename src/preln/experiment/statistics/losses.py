"""Leave-one-out losses as a matrix, and the damage of each block with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from preln.base.stats import paired_intervals

DENSE_ROW = -1  # the layer that stands for the whole model in leave-one-out tables


def damages(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Leave-one-out losses by block: layer, loss, delta to the whole model with its interval, n."""
    losses, weights = loss_matrix(table)
    whole = losses.loc[DENSE_ROW].to_numpy()
    kept = losses.drop(index=DENSE_ROW).sort_index()
    differences = kept.to_numpy() - whole
    low, high = paired_intervals(differences, weights, seed=seed)
    columns = {
        "layer": kept.index.to_numpy(),
        "loss": kept.to_numpy() @ weights / weights.sum(),
        "delta": differences @ weights / weights.sum(),
        "low": low,
        "high": high,
        "n": len(weights),
    }
    return pd.DataFrame(columns)


def loss_matrix(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Losses ``[layer, sequence]`` and the number of targets of each sequence."""
    losses = table.pivot(index="layer", columns="sequence", values="loss")
    weights = table.query("layer == @DENSE_ROW").sort_values("sequence")["tokens"].to_numpy(np.float64)
    return losses, weights
