"""What pruning does to the loss: statistics of held-out losses, paired over sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from preln.experiment.statistics.decisions import Measured, spearman
from preln.experiment.statistics.losses import DENSE_ROW, loss_matrix
from preln.experiment.statistics.registry import (
    MissingData,
    probe_sequences,
    resampled_losses,
    resampled_means,
    statistic,
)

if TYPE_CHECKING:
    from preln.experiment.lab import Lab


def loss_table(lab: Lab, steps: dict[str, str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Losses ``[name, sequence]`` of models on the same evaluation tokens, and the numbers of targets."""
    frames = {name: pd.read_parquet(lab.path(step, "sequences.parquet")) for name, step in steps.items()}
    losses = pd.DataFrame({k: f.set_index("sequence")["loss"] for k, f in frames.items()}).T
    counts = next(iter(frames.values())).set_index("sequence")["tokens"]
    return losses, counts.to_numpy(np.float64)


def gap_to_best(lab: Lab, steps: dict[str, str], first: str, evidence: list[str]) -> Measured:
    """Loss of one model minus the lowest loss of the others, resampled in pairs."""
    if first not in steps or len(steps) < 2:
        raise MissingData(f"needs {first} and at least one other metric in the same condition")
    losses, weights = loss_table(lab, steps)
    means = pd.Series(losses.to_numpy() @ weights / weights.sum(), index=losses.index)
    draws = resampled_losses(losses, weights, lab.study.seed)
    own = list(losses.index).index(first)
    others = np.delete(draws, own, axis=1)
    listed = ", ".join(f"{name} {loss:.3f}" for name, loss in means.sort_values().items())
    return Measured(
        value=float(means[first] - means.drop(first).min()),
        resampled=draws[:, own] - others.min(axis=1),
        n=losses.shape[1],
        note=f"loss in nats: {listed}",
        evidence=evidence,
    )


@statistic(
    "HYP-REVERSE-RAW",
    "loss_gap_to_best",
    "loss after reverse-order pruning minus the best other metric's, nats",
)
def reverse_raw(lab: Lab) -> Measured:
    """Reverse order against the best of the other metrics, before healing, at the first number of blocks."""
    steps = {metric: f"prune-{name}" for metric, name in lab.study.prune.alike().items()}
    return gap_to_best(lab, steps, "reverse", [f"{step}/sequences.parquet" for step in steps.values()])


@statistic(
    "HYP-LAST",
    "last_minus_worst_deep",
    "damage of removing the last block minus the largest damage of another block of the deeper half, nats",
)
def last_block(lab: Lab) -> Measured:
    """The last block's damage against the worst other block of the deeper half."""
    table = pd.read_parquet(lab.path("damage", "sequences.parquet"))
    losses, weights = loss_matrix(table)
    deltas = losses.drop(DENSE_ROW) - losses.loc[DENSE_ROW]
    deep = deltas.iloc[len(deltas) // 2 :]
    if len(deep) < 2:
        raise MissingData("the model has too few blocks for a deeper half")
    means = pd.Series(deep.to_numpy() @ weights / weights.sum(), index=deep.index)
    draws = resampled_losses(deep, weights, lab.study.seed)
    rival = int(means.iloc[:-1].idxmax())
    return Measured(
        value=float(means.iloc[-1] - means.iloc[:-1].max()),
        resampled=draws[:, -1] - draws[:, :-1].max(axis=1),
        n=losses.shape[1],
        note=f"removing the last block costs {means.iloc[-1]:.3f} nats, the worst other deep block "
        f"({rival}) {means.iloc[:-1].max():.3f}",
        evidence=["damage/sequences.parquet"],
    )


def _prediction(lab: Lab, predictor: pd.DataFrame, what: str, note: str) -> Measured:
    """Rank correlation of a per-block predictor with measured damage; both sides resampled on their own."""
    table = pd.read_parquet(lab.path("damage", "sequences.parquet"))
    losses, weights = loss_matrix(table)
    deltas = losses.drop(DENSE_ROW) - losses.loc[DENSE_ROW]
    seed = lab.study.seed
    damage = deltas.to_numpy() @ weights / weights.sum()
    pairs = zip(resampled_means(predictor, seed + 1), resampled_losses(deltas, weights, seed), strict=True)
    return Measured(
        value=spearman(predictor.mean(axis=1), damage),
        resampled=np.array([spearman(a, b) for a, b in pairs]),
        n=min(predictor.shape[1], losses.shape[1]),
        note=f"{what}; {note}" if note else what,
        evidence=["probe/sequences.parquet", "damage/sequences.parquet"],
    )


def _by_attenuation(lab: Lab) -> pd.DataFrame:
    """Squared gradient at each block's output: what attenuation alone says about importance."""
    return probe_sequences(lab, "grad_hidden").iloc[1:] ** 2


@statistic(
    "HYP-PREDICTS",
    "spearman_first_order",
    "rank correlation of first-order damage on calibration tokens with measured damage on held-out ones",
)
def predicts_first_order(lab: Lab) -> Measured:
    """Whether the first-order damage ranks blocks as their removal does."""
    other = _prediction(lab, _by_attenuation(lab), "", "")
    note = (
        f"the gradient at the block's output alone, the published argument, correlates at {other.value:.3f}"
    )
    return _prediction(
        lab, probe_sequences(lab, "first_order_damage"), "predictor: -<dL/dx_(l+1), F_l>", note
    )


@statistic(
    "HYP-PREDICTS",
    "spearman_attenuation",
    "rank correlation of the gradient at the block's output with the measured damage on held-out tokens",
)
def predicts_attenuation(lab: Lab) -> Measured:
    """Whether the fall of the gradient alone ranks blocks as their removal does."""
    return _prediction(lab, _by_attenuation(lab), "predictor: |dL/dx_(l+1)|", "")
