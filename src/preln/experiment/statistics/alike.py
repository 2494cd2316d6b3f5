"""How alike the states before and after a block are, by depth, and how near its Jacobian is to identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from preln.experiment.statistics.decisions import Measured, spearman
from preln.experiment.statistics.registry import (
    MissingData,
    probe_sequences,
    resampled_means,
    statistic,
)

if TYPE_CHECKING:
    from preln.experiment.lab import Lab


@statistic(
    "HYP-SIMILARITY",
    "deep_minus_shallow",
    "mean of 1 - cos(x_l, x_(l+1)) over the deeper half of the blocks without the last, minus the other half",
)
def similarity_by_halves(lab: Lab) -> Measured:
    """Whether the deeper half turns the states less than the shallower half does, the last block left out."""
    turned, draws = _turning(lab)
    half = len(turned) // 2
    last, inner = turned[-1], turned[half:-1]
    return Measured(
        value=float(inner.mean() - turned[:half].mean()),
        resampled=draws[:, half:-1].mean(axis=1) - draws[:, :half].mean(axis=1),
        n=probe_sequences(lab, "block_influence").shape[1],
        note=f"shallower half {turned[:half].mean():.3f}, deeper half {inner.mean():.3f}, last block "
        f"{last:.3f}, block 0 {turned[0]:.3f}; the shallower half without it {turned[1:half].mean():.3f}; "
        f"rank correlation with depth without the last block {_by_depth(turned[:-1]):.3f}",
        evidence=["probe/sequences.parquet"],
    )


@statistic(
    "HYP-SIMILARITY",
    "spearman_depth_without_last",
    "rank correlation of 1 - cos(x_l, x_(l+1)) with l, all blocks but the last",
)
def similarity_by_depth(lab: Lab) -> Measured:
    """Rank correlation of a block's turning of the states with its depth, the last block left out."""
    turned, draws = _turning(lab)
    return Measured(
        value=_by_depth(turned[:-1]),
        resampled=np.array([_by_depth(row[:-1]) for row in draws]),
        n=probe_sequences(lab, "block_influence").shape[1],
        note=f"block 0 {turned[0]:.3f}, least {turned.min():.3f} at block {int(turned.argmin())}, "
        f"last {turned[-1]:.3f}",
        evidence=["probe/sequences.parquet"],
    )


@statistic(
    "HYP-IDENTITY", "spearman_depth", "rank correlation of sigma(J_l - I) with l, over whole sequences"
)
def near_identity(lab: Lab) -> Measured:
    """Whether the blocks' Jacobians come nearer to the identity with depth."""
    path = lab.path("jacobians", "sequences.parquet")
    if not path.is_file():
        raise MissingData("needs the blocks' Jacobians: give the study jacobians")
    table = pd.read_parquet(path).query(
        "measure == 'update_sigma' and site == 'block' and statistic == 'mean'"
    )
    sigma = table.pivot(index="layer", columns="sequence", values="value").sort_index()
    means = sigma.mean(axis=1).to_numpy()
    draws = resampled_means(sigma, lab.study.seed)
    deepest = means[len(means) // 2 :]
    return Measured(
        value=_by_depth(means),
        resampled=np.array([_by_depth(row) for row in draws]),
        n=sigma.shape[1],
        note=f"sigma(J - I): block 0 {means[0]:.3g}, median of the deeper half {np.median(deepest):.3g}, "
        f"least {means.min():.3g} at block {int(means.argmin())}, last {means[-1]:.3g}; below 1 at "
        f"{int((means < 1).sum())} of {len(means)} blocks; without the last block the correlation is "
        f"{_by_depth(means[:-1]):.3f}",
        evidence=["jacobians/sequences.parquet"],
    )


def _turning(lab: Lab) -> tuple[np.ndarray, np.ndarray]:
    """Mean block influence ``[blocks]`` and its resamples ``[draws, blocks]``."""
    table = probe_sequences(lab, "block_influence")
    if len(table) < 4:
        raise MissingData("the model has too few blocks for two halves")
    return table.mean(axis=1).to_numpy(), resampled_means(table, lab.study.seed)


def _by_depth(values: np.ndarray) -> float:
    return spearman(values, np.arange(len(values)))
