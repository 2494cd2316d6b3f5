"""The registry of statistics: plain functions from stored tables to a number that decides a hypothesis.

A function here turns tables into a :class:`Measured`; the study file says which statistic decides, on which
side of which threshold. No threshold stands in code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.base.errors import InputError
from preln.base.stats import resample_indices
from preln.experiment.statistics.decisions import Measured

if TYPE_CHECKING:
    from preln.experiment.lab import Lab


@dataclass(frozen=True)
class Statistic:
    """A number that can decide a hypothesis.

    Attributes:
        function: From a lab to the measured number; with ``of_model``, from a lab and the name of a pruned
            model, or None for the first that has what is needed.
        meaning: What it is, in words.
        of_model: Whether it is about one pruned model.
    """

    function: Callable[..., Measured]
    meaning: str
    of_model: bool = False

    def __call__(self, lab: Lab, model: str | None = None) -> Measured:
        """The number, for one pruned model where the statistic is about one."""
        return self.function(lab, model) if self.of_model else self.function(lab)


STATISTICS: dict[str, dict[str, Statistic]] = {}


def statistic(claim: str, name: str, meaning: str, *, of_model: bool = False) -> Callable[[Any], Any]:
    """Register a statistic that can decide a hypothesis, with its meaning in words."""

    def register(function: Callable[..., Measured]) -> Callable[..., Measured]:
        STATISTICS.setdefault(claim, {})[name] = Statistic(function, meaning, of_model)
        return function

    return register


class MissingData(InputError):
    """The study did not measure what a statistic needs."""


def probe_sequences(lab: Lab, measure: str, site: str = "block") -> pd.DataFrame:
    """Per-sequence values of a probe measure, ``[layer, sequence]``."""
    table = pd.read_parquet(lab.path("probe", "sequences.parquet"))
    wanted = table.query("measure == @measure and site == @site and statistic == 'mean'")
    if wanted.empty:
        raise MissingData(f"the probe did not take {measure} at {site}")
    return wanted.pivot(index="layer", columns="sequence", values="value").sort_index()


def resampled_means(values: pd.DataFrame, seed: int) -> np.ndarray:
    """Row means of each resample of the columns, ``[draws, rows]``."""
    picks = resample_indices(values.shape[1], seed=seed)
    counts = np.stack([np.bincount(row, minlength=values.shape[1]) for row in picks])
    return counts @ values.to_numpy().T / values.shape[1]


def resampled_losses(losses: pd.DataFrame, weights: np.ndarray, seed: int) -> np.ndarray:
    """Token-weighted mean losses of each resample of the sequences, ``[draws, names]``, paired."""
    picks = resample_indices(losses.shape[1], seed=seed)
    counts = np.stack([np.bincount(row, minlength=losses.shape[1]) for row in picks]) * weights
    return counts @ losses.to_numpy().T / counts.sum(axis=1, keepdims=True)
