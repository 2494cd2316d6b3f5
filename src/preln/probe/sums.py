"""Per-sequence sums, the numbers made from them, and their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from preln.base.stats import resample_indices
from preln.models.residual import global_gap

Key = tuple[str, int, str, str]  # measure, layer, site, statistic
# each rule makes a number from sums over sequences; resampled sequences are summed with their multiplicities
RULES: dict[str, Callable[..., Any]] = {
    # nothing over nothing is NaN, without a warning
    "ratio": lambda top, count: np.divide(
        top, count, out=np.full(np.broadcast(top, count).shape, np.nan), where=np.asarray(count) != 0
    ),
    "root": lambda square, count: np.sqrt(square) / count,
    "global_gap": lambda xx, yy, ff: global_gap(xx, yy, ff),
}
KEYS = ["measure", "layer", "site", "statistic"]
JOINED = 64  # arrays of single batches held before they become one
AT_ONCE = 1 << 20  # drawn units held at a time
COLUMNS = [*KEYS, "value", "low", "high", "n"]


def interval(values: npt.NDArray[np.float64], level: float = 0.95) -> npt.NDArray[np.float64]:
    """Percentile interval over the last axis: ``[..., draws] -> [2, ...]``."""
    tail = (1.0 - level) / 2.0
    return np.quantile(values, [tail, 1.0 - tail], axis=-1)


def multiplicities(n: int, *, draws: int, seed: int) -> npt.NDArray[np.float64]:
    """How often each of n units is in each bootstrap sample, ``[n, draws]``."""
    picks = resample_indices(n, draws=draws, seed=seed)
    return np.stack([np.bincount(row, minlength=n) for row in picks], axis=1).astype(np.float64)


def resampled(parts: npt.NDArray[np.float64], *, draws: int, seed: int) -> npt.NDArray[np.float64]:
    """Sums of ``[..., n]`` summands over bootstrap samples of their n units, ``[..., draws]``.

    ``parts @ multiplicities(n, …)``, but samples are drawn and summed some at a time, so that memory does not
    grow with ``n draws``; which units each holds does not depend on how many that is.
    """
    n = parts.shape[-1]
    rng, step = np.random.default_rng(seed), max(64, AT_ONCE // n)
    found = []
    for start in range(0, draws, step):
        picks = rng.integers(0, n, size=(min(step, draws - start), n))
        counts = np.stack([np.bincount(row, minlength=n) for row in picks], axis=1)
        found.append(parts @ counts.astype(np.float64))
    return found[0] if len(found) == 1 else np.concatenate(found, axis=-1)


class Sums:
    """For every key a rule and its summands, one column a sequence: nothing of the size of T or d."""

    def __init__(self) -> None:
        self._rules: dict[Key, str] = {}
        self._batch: dict[Key, Tensor] = {}
        self._done: dict[Key, list[npt.NDArray[np.float64]]] = {}

    def add(self, key: Key, rule: str, *summands: Tensor) -> None:
        """Add the ``[b]`` summands of the present sequence batch."""
        self._rules[key] = rule
        self._batch[key] = torch.stack([s.double() for s in summands])

    def flush(self) -> None:
        """Move the present batch's sums off the device."""
        for key, value in self._batch.items():
            parts = self._done.setdefault(key, [])
            # copied: what shares memory with a tensor keeps all of that tensor alive
            parts.append(value.cpu().numpy().copy())
            if len(parts) >= JOINED:
                parts[:] = [np.concatenate(parts, axis=1)]
        self._batch.clear()

    def state(self) -> tuple[dict[str, list[list[Any]]], dict[str, Tensor]]:
        """For each rule its keys and their summands, ``[summand, key, sequence]``: what a resume needs."""
        found = self._parts()
        keys = {name: table.values.tolist() for name, (table, _) in found.items()}
        return keys, {name: torch.from_numpy(parts).contiguous() for name, (_, parts) in found.items()}

    def restore(self, keys: dict[str, list[list[Any]]], parts: dict[str, Tensor]) -> None:
        """Start from a former :meth:`state`."""
        for name, rows in keys.items():
            for index, (measure, layer, site, statistic) in enumerate(rows):
                key = (measure, int(layer), site, statistic)
                self._rules[key], self._done[key] = name, [parts[name][:, index].numpy()]

    def _parts(self) -> dict[str, tuple[pd.DataFrame, npt.NDArray[np.float64]]]:
        """For each rule: its keys as columns, and the summands ``[summand, key, sequence]``."""
        found = {}
        for name in RULES:
            keys = [key for key in self._done if self._rules[key] == name]
            if keys:
                parts = np.stack([np.concatenate(self._done[key], axis=1) for key in keys], axis=1)
                found[name] = (pd.DataFrame(keys, columns=KEYS), parts)
        return found

    def _groups(self) -> list[tuple[Callable[..., Any], pd.DataFrame, npt.NDArray[np.float64]]]:
        """For each rule: the function, its keys as columns, and the summands."""
        return [(RULES[name], keys, parts) for name, (keys, parts) in self._parts().items()]

    def table(self, *, draws: int, seed: int) -> pd.DataFrame:
        """One row a key: the value over all sequences, and its interval by resampling sequences."""
        frames = []
        for rule, keys, parts in self._groups():
            n = parts.shape[-1]
            low = high = float("nan")
            if draws and n > 1:
                low, high = interval(rule(*resampled(parts, draws=draws, seed=seed)))
            frames.append(keys.assign(value=rule(*parts.sum(axis=-1)), low=low, high=high, n=n))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)

    def sequences(self) -> pd.DataFrame:
        """One row a key and sequence: the same number from that sequence alone."""
        frames = []
        for rule, keys, parts in self._groups():
            n = parts.shape[-1]
            rows = keys.loc[np.repeat(keys.index, n)].reset_index(drop=True)
            frames.append(rows.assign(sequence=np.tile(np.arange(n), len(keys)), value=rule(*parts).ravel()))
        columns = [*KEYS, "sequence", "value"]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
