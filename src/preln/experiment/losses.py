"""Leave-one-out losses as a matrix, and the damage of each block with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd

from preln.base.stats import resample_indices

DENSE_ROW = -1  # the layer that stands for the whole model in leave-one-out tables


def damages(table: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Leave-one-out losses by block: layer, loss, delta to the whole model with its interval, n."""
    losses, weights = loss_matrix(table)
    picks = resample_indices(len(weights), seed=seed)
    dense = losses.loc[DENSE_ROW].to_numpy()
    rows = []
    for layer in range(len(losses) - 1):
        own = losses.loc[layer].to_numpy()
        w = weights[picks]
        deltas = ((own - dense)[picks] * w).sum(axis=1) / w.sum(axis=1)
        low, high = np.quantile(deltas, [0.025, 0.975])
        loss = float(own @ weights / weights.sum())
        delta = float((own - dense) @ weights / weights.sum())
        rows.append((int(layer), loss, delta, float(low), float(high), len(weights)))
    return pd.DataFrame(rows, columns=["layer", "loss", "delta", "low", "high", "n"])


def loss_matrix(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Losses ``[layer, sequence]`` and the number of targets of each sequence."""
    losses = table.pivot(index="layer", columns="sequence", values="loss")
    weights = table.query("layer == @DENSE_ROW").sort_values("sequence")["tokens"].to_numpy(np.float64)
    return losses, weights
