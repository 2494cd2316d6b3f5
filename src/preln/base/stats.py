"""Intervals by the bootstrap (Efron 1979, percentile method)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def resample_indices(n: int, *, draws: int = 1000, seed: int = 0) -> npt.NDArray[np.int64]:
    """Row indices of ``draws`` bootstrap samples of ``n`` units, shape ``[draws, n]``, fixed by ``seed``."""
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    statistic: Callable[[npt.NDArray[np.float64]], float] = np.mean,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval over the first axis of ``values`` (the sequences, or the seeds).

    With ``weights`` the statistic is the weighted mean ``sum(w v) / sum(w)`` of each resample, as for a
    loss averaged over tokens where sequences hold different numbers of them.

    Args:
        values: ``[n]`` or ``[n, ...]``, one row a unit that is resampled.
        statistic: Maps a resample to a number; not used with ``weights``.
        draws: Number of resamples.
        level: Coverage aimed at.
        seed: Fixes the resamples.
        weights: ``[n]`` non-negative weights, or None.

    Returns:
        ``(low, high)``; with one unit only, ``(nan, nan)``, since a single unit shows no spread.

    >>> low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0], seed=0)
    >>> low < 2.5 < high
    True
    """
    data = np.asarray(values, dtype=np.float64)
    if data.shape[0] < 2:
        return float("nan"), float("nan")
    indices = resample_indices(data.shape[0], draws=draws, seed=seed)
    if weights is not None:
        w = np.asarray(weights, dtype=np.float64)
        samples = (data[indices] * w[indices]).sum(axis=1) / w[indices].sum(axis=1)
    elif statistic is np.mean and data.ndim == 1:
        samples = data[indices].mean(axis=1)
    else:
        samples = np.array([statistic(data[row]) for row in indices])
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_intervals(
    differences: npt.ArrayLike, weights: npt.ArrayLike, *, draws: int = 1000, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % percentile intervals of many weighted means over the same units, resampled together.

    Args:
        differences: ``[rows, n]``, one column a unit that is resampled.
        weights: ``[n]`` non-negative weights.
        draws: Number of resamples.
        seed: Fixes the resamples.

    Returns:
        Lower and upper ends, ``[rows]`` each; NaN with one unit only, which shows no spread.
    """
    rows, w = np.asarray(differences, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len(w) < 2:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    picks = resample_indices(len(w), draws=draws, seed=seed)
    samples = np.einsum("rds,ds->rd", rows[:, picks], w[picks]) / w[picks].sum(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return low, high
