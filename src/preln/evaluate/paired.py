"""Two models on the same documents: the difference itself with its interval, not two averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from preln.base.errors import InputError

MEAN = "mean of tasks"
_COLUMNS = ["task", "n", "first", "second", "difference", "low", "high", "first_only", "second_only", "p"]
Floats = npt.NDArray[np.float64]


def compare_documents(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    metric: str = "acc",
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare two models document by document, task by task and over the mean of tasks.

    With ``d = second - first`` on a document, a task's difference is the mean of d over its documents, and
    the last row is the plain mean over tasks. Intervals resample documents within each task (percentile
    bootstrap, Efron 1979; pairs stay together), so they hold for these tasks and not for tasks at large. The
    test is McNemar's exact one (1947): of the ``first_only + second_only`` documents on which the two differ,
    each side's count is binomial with 1/2 if the models are equally good; p is two-sided. Outcomes that are
    shares rather than 0 or 1 make it the sign test, whose counts say which model did better.

    Args:
        first: ``documents`` of one result of :func:`preln.evaluate.evaluate_tasks`.
        second: That of the other.
        metric: ``acc`` or ``acc_norm``; tasks without it are left out.
        groups: By name, the tasks (or other groups) that a group consists of; its documents count together,
            each with the same weight, as in lm-eval's mmlu. Tasks of no group stand for themselves.
        draws: Bootstrap resamples.
        level: Coverage of the intervals.
        seed: Fixes the resamples.

    Returns:
        One row a task and the row ``mean of tasks``: ``n`` documents, ``first`` and ``second`` (the means),
        ``difference`` (second minus first), ``low``, ``high`` (NaN where a task has one document only),
        ``first_only``, ``second_only`` (documents on which only that model, or it more than the other, is
        right), ``p``. In the last row documents are counted over all tasks.

    Raises:
        InputError: The two frames hold different documents, or no task has the metric.
    """
    rows, resamples = [], []
    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    for name, part, differences, means in _by_task(first, second, metric, groups, draws, seed):
        rows.append(_row(name, part, differences, np.quantile(means, tails)))
        resamples.append(means)
    total: Any = pd.DataFrame(rows, columns=_COLUMNS)
    low, high = np.quantile(np.mean(resamples, axis=0), tails)
    better, worse = int(total["first_only"].sum()), int(total["second_only"].sum())
    rows.append(
        {"task": MEAN, "n": int(total["n"].sum()), "low": float(low), "high": float(high)}
        | {name: float(total[name].mean()) for name in ("first", "second", "difference")}
        | {"first_only": better, "second_only": worse, "p": mcnemar(better, worse)}
    )
    return pd.DataFrame(rows, columns=_COLUMNS)


def mean_difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    metric: str = "acc",
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, Floats, int]:
    """The last row of :func:`compare_documents`: the difference, its resamples, and how many documents.

    Raises:
        InputError: See :func:`compare_documents`.
    """
    parts = list(_by_task(first, second, metric, groups, draws, seed))
    value = float(np.mean([differences.mean() for _, _, differences, _ in parts]))
    return value, np.mean([means for *_, means in parts], axis=0), sum(len(part) for _, part, _, _ in parts)


def _by_task(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metric: str,
    groups: Mapping[str, Sequence[str]] | None,
    draws: int,
    seed: int,
) -> Iterator[tuple[str, Any, Floats, Floats]]:
    """Each task's name, pairs, differences, and resampled means of these, from a stream of its own."""
    pairs = _pair(first, second, metric)
    tasks = _regroup(list(dict.fromkeys(pairs["task"])), groups or {})
    streams = np.random.SeedSequence(seed).spawn(len(tasks))
    for (name, members), stream in zip(tasks.items(), streams, strict=True):
        part: Any = pairs[pairs["task"].isin(members)]
        differences = (part["second"] - part["first"]).to_numpy(np.float64)
        yield name, part, differences, _resampled_means(differences, draws, np.random.default_rng(stream))


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any], **settings: Any) -> pd.DataFrame:
    """Compare two results of :func:`preln.evaluate.evaluate` by their documents, with the groups they report.

    Raises:
        InputError: A result holds no documents, or not the same ones.
    """
    for result in (first, second):
        if not isinstance(result.get("documents"), pd.DataFrame):
            raise InputError(
                f"{result.get('model') or 'a result'}: holds no documents to compare: give it tasks"
            )
    groups = groups_of(first) if settings.get("groups") is None else settings.pop("groups")
    return compare_documents(first["documents"], second["documents"], groups=groups, **settings)


def compare_several(
    baseline: pd.DataFrame, others: Mapping[str, pd.DataFrame], **settings: Any
) -> pd.DataFrame:
    """Several models against one: :func:`compare_documents` of each, with Holm's p (1979).

    A family is the comparisons of all models on one task (or on the mean of tasks): the chance that any of
    its ``p_holm`` falls below a threshold by luck is at most that threshold.

    Returns:
        The rows of all comparisons under ``model``, and ``p_holm``. ``first`` is the baseline.
    """
    if not others:
        raise InputError("nothing to compare with the baseline: give at least one other model")
    tables = [
        compare_documents(baseline, frame, **settings).assign(model=name) for name, frame in others.items()
    ]
    table: Any = pd.concat(tables, ignore_index=True)
    table["p_holm"] = table.groupby("task", sort=False)["p"].transform(lambda p: holm(p.to_numpy(np.float64)))
    return table[["model", *_COLUMNS, "p_holm"]]


def groups_of(result: Mapping[str, Any], sat: Iterable[str] = ()) -> dict[str, list[str]]:
    """The groups among a result's reported tasks, with their members, as the result or lm-eval recorded them.

    Args:
        result: Of :func:`preln.evaluate.evaluate_tasks`, or what is stored of it.
        sat: The tasks of its documents. A result without a record is taken to have as members of a group
            those whose name begins with the group's, as lm-eval names them.
    """
    if "groups" in result:
        return dict(result["groups"])
    own = result.get("lm_eval", {}).get("group_subtasks")
    if own is None:
        names = list(dict.fromkeys(sat))
        groups = [name for name in result["tasks"] if name not in names]
        found = {group: [name for name in names if name.startswith(f"{group}_")] for group in groups}
        return {group: members for group, members in found.items() if members}
    # a group is reported only if it was asked for: its subgroups stay inside it
    inner = {name: members for name, members in own.items() if name not in result["tasks"]}
    reported = {name: own[name] for name in result["tasks"] if name in own}
    return {name: _leaves(members, {**inner, **reported}) for name, members in reported.items()}


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of McNemar's exact test: Binomial(b + c, 1/2) as far from its middle as b; 1 if b + c = 0.

    >>> round(mcnemar(1, 9), 6)
    0.021484
    """
    from scipy.stats import binomtest

    discordant = first_only + second_only
    return float(binomtest(first_only, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's adjusted p-values: the i-th smallest of m times (m - i + 1), made monotone, at most 1.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _pair(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The documents of both, side by side, once they are known to be the same ones."""
    keys, frames = ["task", "doc_id"], []
    for side, frame in (("first", first), ("second", second)):
        if missing := [c for c in (*keys, "doc_hash", metric) if c not in frame.columns]:
            raise InputError(f"{side} model's documents have no column {missing[0]!r}: use evaluate's frame")
        if (twice := frame.duplicated(keys)).any():
            task, number = frame.loc[twice, keys].iloc[0]
            raise InputError(f"{task}: document {number} is there twice in the {side} model's documents")
        chosen: Any = frame[[*keys, "doc_hash", metric]]
        frames.append(chosen.rename(columns={metric: side}))
    both = frames[0].merge(frames[1], on=keys, how="outer", suffixes=("", "_second"), indicator=True)
    alone = both[both["_merge"] != "both"]
    if len(alone):
        task, number, merged = alone.iloc[0][[*keys, "_merge"]]
        side = "second" if merged == "left_only" else "first"
        raise InputError(
            f"{task}: document {number} is missing from the {side} model's documents: use the same limit"
        )
    other = both[both["doc_hash"] != both["doc_hash_second"]]
    if len(other):
        task, number = other.iloc[0][keys]
        raise InputError(f"{task}: document {number} is another text for each model: use the same rows")
    for task, part in both.groupby("task"):
        known = part[["first", "second"]].notna()
        if known.to_numpy().any() and not known.to_numpy().all():
            number = part.loc[~known.all(axis=1), "doc_id"].iloc[0]
            raise InputError(f"{task}: document {number} has no {metric} for one of the models")
    counted = both[both["first"].notna()]
    if counted.empty:
        raise InputError(f"no task here has {metric}: compare acc, or other tasks")
    return counted.sort_values(keys, kind="stable", ignore_index=True)


def _regroup(tasks: list[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Name to single tasks: groups first come where their first member stood."""
    owner: dict[str, str] = {}
    for name, members in groups.items():
        for leaf in _leaves(members, groups):
            if leaf in owner:
                raise InputError(f"{leaf}: is in the groups {owner[leaf]} and {name}: name one of them")
            owner[leaf] = name
    chosen: dict[str, list[str]] = {}
    for task in tasks:
        chosen.setdefault(owner.get(task, task), []).append(task)
    return chosen


def _leaves(members: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The single tasks below some members."""
    found = [_leaves(groups[m], groups) if m in groups else [m] for m in members]
    return [leaf for part in found for leaf in part]


def _resampled_means(values: Floats, draws: int, generator: np.random.Generator) -> Floats:
    """Means of ``draws`` bootstrap samples; NaN for a single value.

    How often each distinct value is drawn is multinomial, which is the same law as drawing indices and needs
    no table of draws x documents.
    """
    if len(values) < 2:
        return np.full(draws, math.nan)
    distinct, counts = np.unique(values, return_counts=True)
    drawn = generator.multinomial(len(values), counts / len(values), size=draws)
    return drawn @ distinct / len(values)


def _row(name: str, part: Any, differences: Floats, ends: Floats) -> dict[str, Any]:
    """One task's numbers."""
    better, worse = int((differences < 0).sum()), int((differences > 0).sum())
    return {
        "task": name,
        "n": len(part),
        "first": float(part["first"].mean()),
        "second": float(part["second"].mean()),
        "difference": float(differences.mean()),
        "low": float(ends[0]),
        "high": float(ends[1]),
        "first_only": better,
        "second_only": worse,
        "p": mcnemar(better, worse),
    }
