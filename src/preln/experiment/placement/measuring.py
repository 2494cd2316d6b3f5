"""What is measured of one model of a placement study: gradients, angles, and the loss as blocks go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from preln.experiment.placement.study import ALIKE, ORDERS, PROFILES, prunable
from preln.experiment.statistics.decisions import spearman
from preln.probe import probe_tables
from preln.prune import removal_losses, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURES = (*PROFILES, "block_influence", "residual_rms", "update_ratio")


def depth_table(model: PreTrainedModel, tokens: Int[Tensor, "n t"], *, seed: int) -> tuple[pd.DataFrame, Any]:
    """Measures by depth of one model, and the manifest of the probe.

    Returns:
        measure, layer, value, low, high, where ``angular_distance`` at layer l is that of x[l] and x[l+1],
        over pi; the interval resamples sequences (of gradients of parameters, sequence batches).
    """
    batch = min(8, max(1, len(tokens) // 6))  # six passes or more: their gradients are resampled
    found = probe_tables(model, tokens, measures=MEASURES, batch_size=batch, seed=seed)
    columns = ["measure", "layer", "value", "low", "high"]
    layers = found.layers.query("site == 'block' and statistic == 'mean'").loc[:, columns]
    assert found.pairs is not None  # they are taken unless refused
    near = found.pairs.query("size == 1").rename(
        columns={
            "start": "layer",
            "angular_distance": "value",
            "angular_distance_low": "low",
            "angular_distance_high": "high",
        }
    )
    near = near.assign(measure="angular_distance").loc[:, columns]
    return pd.concat([layers, near], ignore_index=True), found.manifest


def removal_orders(influence: np.ndarray) -> dict[tuple[str, bool], list[int]]:
    """Blocks in the order in which they go, by criterion and by whether the last is kept.

    >>> removal_orders(np.array([3.0, 1.0, 2.0]))["block_influence", True]
    [1, 0]
    >>> removal_orders(np.array([3.0, 1.0, 2.0]))["deepest", False]
    [2, 1, 0]
    """
    last = len(influence) - 1
    orders = {"deepest": list(range(last, -1, -1)), "block_influence": np.argsort(influence, kind="stable")}
    return {
        (name, kept): [int(b) for b in order if not (kept and b == last)]
        for name, order in orders.items()
        for kept in (False, True)
    }


def removal_table(
    model: PreTrainedModel, calibration: Int[Tensor, "n t"], evaluation: Int[Tensor, "m t"]
) -> pd.DataFrame:
    """Loss as blocks go one by one, until one is left.

    Args:
        model: The model.
        calibration: Tokens that block influence is taken on.
        evaluation: Tokens, of other documents, that the losses are taken on.

    Returns:
        order, last_kept, removed (how many), block (the one that went last, -1 at first), loss (nats).
    """
    influence = score(model, calibration, ["block_influence"]).sort_values("layer")["score"].to_numpy()
    orders = removal_orders(influence)
    sets = {
        f"{name}/{int(kept)}/{count}": order[:count]
        for (name, kept), order in orders.items()
        for count in range(min(len(order), len(influence) - 1) + 1)
    }
    losses = removal_losses(model, evaluation, sets, batch_size=8)
    rows = []
    for name, table in losses.groupby("name", sort=False):
        order, kept, count = str(name).split("/")
        gone = sets[str(name)]
        loss = float(np.average(table["loss"], weights=table["tokens"]))
        rows.append((order, bool(int(kept)), int(count), gone[-1] if gone else -1, loss))
    return pd.DataFrame(rows, columns=["order", "last_kept", "removed", "block", "loss"])


def prunable_depth(curve: pd.DataFrame, rise: float) -> int:
    """The largest number of blocks that can go at a loss increase of at most ``rise`` nats.

    >>> prunable_depth(pd.DataFrame({"removed": [0, 1, 2], "loss": [2.0, 2.1, 2.7]}), 0.5)
    1
    """
    whole = curve.loc[curve["removed"] == 0, "loss"].iloc[0]
    return int(curve.loc[curve["loss"] <= whole + rise, "removed"].max())


def model_numbers(
    depth: pd.DataFrame, removals: pd.DataFrame | None, rises: tuple[float, ...]
) -> dict[str, float]:
    """The numbers of :func:`preln.experiment.placement.study.quantities`; of removals where there are any.

    ``…_spearman`` is the rank correlation of a gradient's norm with depth, ``…_log_ratio`` log10 of its first
    value over its last (x[0] over x[L], block 0 over block L-1). ``…_deep_minus_shallow`` is the mean over
    blocks L/2 to L-2, less that over blocks 0 to L/2-1: the last block is in neither (NaN with two blocks).
    """
    profile = {
        str(name): rows.sort_values("layer")["value"].to_numpy(np.float64)
        for name, rows in depth.groupby("measure")
    }
    found: dict[str, float] = {}
    for name in PROFILES:
        values = profile[name]
        found[f"{name}_spearman"] = spearman(values, np.arange(len(values)))
        found[f"{name}_log_ratio"] = float(np.log10(values[0] / values[-1]))
    for name in ALIKE:
        values = profile[name][:-1]
        middle = len(profile[name]) // 2
        halves = values[:middle], values[middle:]
        known = min(map(len, halves)) > 0
        found[f"{name}_deep_minus_shallow"] = (
            float(halves[1].mean() - halves[0].mean()) if known else float("nan")
        )
    if removals is not None:
        for order in ORDERS:
            for kept in (False, True):
                curve = removals.query("order == @order and last_kept == @kept")
                for rise in rises:
                    found[prunable(order, kept, rise)] = float(prunable_depth(curve, rise))
    return found
