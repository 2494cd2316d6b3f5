"""Healed models of a study by recipe and rate: losses over seeds and sequences, curves, times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from preln.base.stats import resample_indices
from preln.experiment.sections import HealRun, healed_name
from preln.experiment.statistics.registry import MissingData

if TYPE_CHECKING:
    from preln.experiment.lab import Lab

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Healed:
    """One pruned model healed by one recipe at one rate, over seeds.

    Attributes:
        name: The group's name, such as ``lora-0.0001``.
        steps: Ids of the steps, one a seed.
        results: Their ``result.json``.
        losses: ``[seeds, sequences]`` held-out losses in nats.
        weights: ``[sequences]`` numbers of targets.
        curves: Their histories.
    """

    name: str
    steps: list[str]
    results: list[dict[str, Any]]
    losses: Array
    weights: Array
    curves: list[pd.DataFrame]

    @property
    def loss(self) -> float:
        """Mean held-out loss over tokens and seeds."""
        return float((self.losses @ self.weights / self.weights.sum()).mean())

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.results[0]["learning_rate"])

    @property
    def validation(self) -> float:
        """Mean validation loss after healing: what a rate is chosen by."""
        return float(np.mean([result["validation_after"] for result in self.results]))

    def draws(self, seed: int) -> Array:
        """The loss in bootstrap samples of sequences and of seeds; equal ``seed``, equal samples."""
        sequences = resample_indices(self.losses.shape[1], seed=seed)
        seeds = resample_indices(self.losses.shape[0], seed=seed + 1)
        counts = np.stack([np.bincount(row, minlength=self.losses.shape[1]) for row in sequences])
        scaled = counts * self.weights
        means = scaled @ self.losses.T / scaled.sum(axis=1, keepdims=True)
        return np.take_along_axis(means, seeds, axis=1).mean(axis=1)

    def seconds(self) -> Array:
        """Seconds of each run, ``[seeds]``: its updates, and one pass over its rows where states were stored.

        An update counts as the median of the run's updates, so that a machine that was busy for a while does
        not decide; the pass is charged as a whole forward pass, head included, measured on held-out tokens.
        """
        return np.array([_seconds(r, c) for r, c in zip(self.results, self.curves, strict=True)])

    def memory(self) -> float:
        """Largest peak memory of the runs, in bytes."""
        return float(max(result["peak_memory_bytes"] for result in self.results))

    def validation_at(self, seconds: float) -> Array:
        """Validation loss of each run when it had run so long, between measured points along the line."""
        found = []
        for result, curve in zip(self.results, self.curves, strict=True):
            rows = curve.loc[curve["split"] == "validation"].sort_values(by="step")
            ahead, each = _ahead(result), _update(curve)
            found.append(np.interp(seconds, ahead + each * rows["step"].to_numpy(), rows["loss"].to_numpy()))
        return np.array(found)


def healed(lab: Lab, model: str | None, recipes: tuple[str, ...]) -> list[Healed]:
    """All groups of a pruned model whose recipe is one of ``recipes``, in the study's order.

    Args:
        lab: The study's lab.
        model: The pruned model; the first that such a recipe healed if None.
        recipes: Names of recipes.
    """
    runs = [run for run in lab.study.heal_runs if run.recipe in recipes]
    if model is None and runs:
        model = runs[0].models[0]
    groups: dict[str, list[HealRun]] = {}
    for run in runs:
        if model in run.models:
            groups.setdefault(run.group, []).append(run)
    return [_read(lab, str(model), name, members) for name, members in groups.items()]


def best(groups: list[Healed], what: str) -> Healed:
    """The group with the lowest validation loss.

    Raises:
        MissingData: There is none.
    """
    if not groups:
        raise MissingData(f"needs a pruned model healed by {what}")
    return min(groups, key=lambda group: group.validation)


def _read(lab: Lab, model: str, name: str, runs: list[HealRun]) -> Healed:
    steps = [f"heal-{healed_name(model, run)}" for run in runs]
    frames = [
        pd.read_parquet(lab.path(step, "sequences.parquet")).sort_values(by="sequence") for step in steps
    ]
    return Healed(
        name,
        steps,
        [lab.result(step) for step in steps],
        np.stack([frame["loss"].to_numpy(np.float64) for frame in frames]),
        frames[0]["tokens"].to_numpy(np.float64),
        [pd.read_parquet(lab.path(step, "training.parquet")) for step in steps],
    )


def _update(curve: pd.DataFrame) -> float:
    """Median seconds of an update."""
    seconds = curve.loc[curve["split"] == "train", "seconds"].to_numpy()
    return float(np.median(np.diff(seconds, prepend=0.0)))


def _ahead(result: dict[str, Any]) -> float:
    """Seconds of the pass that filled the cache, if there was one."""
    return result["forward_seconds_per_token"] * result["tokens"] if result["cache"] else 0.0


def _seconds(result: dict[str, Any], curve: pd.DataFrame) -> float:
    return _ahead(result) + _update(curve) * result["steps"]
