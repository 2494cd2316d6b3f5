"""Criteria side by side: how far their orders agree, and what following each of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.stats import paired_intervals
from preln.models import find_blocks
from preln.prune.criteria import CRITERIA
from preln.prune.half_scores import score_any
from preln.prune.plan import protected_blocks
from preln.prune.registry import HALF_METRICS, Ranked, lowest_first, shared_metrics, split_names
from preln.prune.removals import removal_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED = "measured_damage"
_DENSE = "the whole model"
_WINDOWS = {"windows", "token_windows"}


@dataclass(frozen=True)
class Comparison:
    """Criteria side by side.

    Attributes:
        scores: metric, layer, half (``block``, or ``attention``, ``mlp``), score, rank. Beside the criteria
            over blocks stands ``measured_damage``: the held-out loss that removing each block by itself adds.
        correlations: metric, other, spearman, overlap: Spearman's rank correlation of the orders of blocks,
            and the share of the largest removal's blocks that both choose.
        damage: metric, drop, layers, loss, damage, low, high, n: held-out loss (nats) without the first
            ``drop`` parts of a criterion, what that adds to the whole model's, and its 95 % interval.
    """

    scores: pd.DataFrame
    correlations: pd.DataFrame
    damage: pd.DataFrame


def rank_correlations(scores: pd.DataFrame, size: int) -> pd.DataFrame:
    """Spearman's correlation of every two orders of blocks, and the share of the first ``size`` in both.

    Args:
        scores: Table of :func:`preln.prune.score`.
        size: How many blocks are to go.

    Returns:
        metric, other, spearman, overlap; every ordered pair, also of a metric with itself.
    """
    ranks = scores.pivot(index="layer", columns="metric", values="rank")
    ranks = ranks.loc[:, list(dict.fromkeys(scores["metric"]))]
    coefficients = pd.DataFrame.corr(ranks, method="spearman")
    chosen = {name: set(ranks.index[ranks[name] < size]) for name in ranks}
    rows = [
        (a, b, float(coefficients.at[a, b]), len(chosen[a] & chosen[b]) / size) for a in ranks for b in ranks
    ]
    return pd.DataFrame(rows, columns=["metric", "other", "spearman", "overlap"])


def compare(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    held_out: Int[Tensor, "n t"],
    metrics: str | Sequence[str] = "all",
    *,
    drops: Sequence[int],
    seed: int = 0,
    protect: str = "none",
) -> Comparison:
    """Score by every criterion, remove by every criterion, and measure the loss on other tokens.

    Criteria that choose a window choose one for every size. ``drops`` counts blocks; a criterion over both
    kinds of halves lets twice as many halves go, one over attention or MLP alone the same number.

    Args:
        model: A causal model; left as it was.
        batch: Calibration tokens, which the criteria see.
        held_out: Tokens that the losses are measured on.
        metrics: Names over blocks or halves, or ``"all"``.
        drops: How many blocks go.
        seed: For criteria that draw, and for the intervals.
        protect: Preset of blocks that may not go.

    Raises:
        InputError: Bad tokens, metrics or sizes, or losses that are not finite.
    """
    count, sizes = len(find_blocks(model)[1]), sorted(set(drops))
    free = count - len(protected_blocks(protect, count))
    bad = [d for d in sizes if isinstance(d, bool) or not 1 <= d < count or d > free]
    if not sizes or bad:
        raise InputError(f"damage {bad or 'of nothing'}: give sizes from 1 to {min(free, count - 1)}")
    names = split_names(metrics, shared_metrics())
    told = {"seed": seed, "protect": protect}
    tables = {}
    for size in reversed(sizes):  # the largest: greedy orders of smaller sizes are its beginnings
        again = names if size == sizes[-1] else [n for n in names if _is_window(n)]
        for name in _with_one_size(again):
            parts = _parts_of(name[0], size)
            tables[size, name] = score_any(model, batch, list(name), size=parts, **told)
    removals = {}
    for (size, group), table in tables.items():
        for name in group:
            for drop in sizes if size == sizes[-1] and not _is_window(name) else [size]:
                removals[name, drop] = _first(table, name, _parts_of(name, drop), protect)
    largest = pd.concat([t for (size, _), t in tables.items() if size == sizes[-1]], ignore_index=True)
    labelled = {f"{name}, {drop}": gone for (name, drop), gone in removals.items()}
    single = {f"block {layer}": [layer] for layer in range(count)}
    losses = removal_losses(model, held_out, {_DENSE: [], **single, **labelled})
    effects = _effects(losses, seed)
    scores = _with_measured(largest, effects.loc[list(single)], names)
    rows = [
        {"metric": name, "drop": drop, "layers": ",".join(map(str, gone)), **effects.loc[f"{name}, {drop}"]}
        for (name, drop), gone in sorted(removals.items(), key=lambda i: (names.index(i[0][0]), i[0][1]))
    ]
    damage = pd.DataFrame([{**effects.loc[_DENSE], "metric": "dense", "drop": 0, "layers": ""}, *rows])
    damage = damage.loc[:, ["metric", "drop", "layers", "loss", "damage", "low", "high", "n"]]
    by_block = scores.loc[scores["half"] == "block"]
    scores.attrs = {"size": sizes[-1], "protect": protect}
    return Comparison(scores, rank_correlations(by_block, sizes[-1]), damage.astype({"n": int}))


def _is_window(name: str) -> bool:
    """Whether what a criterion chooses for one size is not the beginning of what it chooses for a larger."""
    return "@" not in name and name not in HALF_METRICS and bool(_WINDOWS & CRITERIA[name].needs)


def _parts_of(name: str, drop: int) -> int:
    """How many blocks, or halves, of a criterion stand for ``drop`` blocks."""
    return 2 * drop if name.startswith("finercut") else drop


def _with_one_size(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Criteria that can be asked together: those over both kinds of halves take a size of their own."""
    doubled = tuple(n for n in names if _parts_of(n, 1) == 2)
    return [group for group in (tuple(n for n in names if n not in doubled), doubled) if group]


def _first(table: pd.DataFrame, name: str, parts: int, protect: str) -> list[int | str]:
    """The first parts that go under a criterion and may."""
    mine = table.loc[table["metric"] == name].sort_values(by="rank")
    spared = protected_blocks(protect, max(mine["layer"].tolist()) + 1)
    mine = mine.loc[~mine["layer"].isin(list(spared))].head(parts)
    halves = mine["half"].tolist() if "half" in mine else ["block"] * len(mine)
    named = sorted(zip(mine["layer"].tolist(), halves, strict=True))
    return [layer if half == "block" else f"{layer}{half[0]}" for layer, half in named]


def _effects(losses: pd.DataFrame, seed: int) -> pd.DataFrame:
    """By removal: loss, and its paired difference to the whole model's with a bootstrap interval."""
    table = losses.pivot(index="name", columns="sequence", values="loss")
    weights = losses.loc[losses["name"] == _DENSE].sort_values(by="sequence")["tokens"].to_numpy(np.float64)
    differences = table.to_numpy() - table.loc[_DENSE].to_numpy()
    low, high = paired_intervals(differences, weights, seed=seed)
    return pd.DataFrame(
        {
            "loss": table.to_numpy() @ weights / weights.sum(),
            "damage": differences @ weights / weights.sum(),
            "low": low,
            "high": high,
            "n": len(weights),
        },
        index=table.index,
    )


def _with_measured(table: pd.DataFrame, single: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The scores in the order asked for, and the measured damage of single blocks as one more metric."""
    values = single["damage"].to_numpy()
    ranks = Ranked(values, lowest_first(values)).ranks
    measured = pd.DataFrame(
        {"metric": MEASURED, "layer": np.arange(len(values)), "half": "block", "score": values, "rank": ranks}
    )
    if "half" not in table:
        table = table.assign(half="block")
    table = table.assign(half=table["half"].fillna("block"))
    place = {name: number for number, name in enumerate(names)}
    table = table.sort_values(by="metric", key=lambda column: column.map(place), kind="stable")
    return pd.concat([table.loc[:, list(measured.columns)], measured], ignore_index=True)
