"""The layer explorer's numbers: one row a run, measure and site, one cell a depth, and what was pruned.

The page holds them as a table, which is what a reader without the script (or with a screen reader) gets; the
script draws its panels from the same cells, so that drawing and table cannot say different things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from preln.report.compare import labels
from preln.report.depth_figures import select
from preln.report.load import Run
from preln.report.summary import ranges
from preln.report.tables import number

FIRST = ("residual_rms", "grad_hidden", "norm_sigma")
"""The measures drawn before the reader chooses, where a run has them."""

_SITES = ("block", "attention", "mlp", "final_norm")


def measures(run: Run) -> pd.DataFrame:
    """Everything that a run stores by depth, one value a measure, site and layer.

    The probe's measures keep their names, a metric's scores become ``score: NAME`` and the measured damage
    of removing one block ``damage``; those of a pruned model are ``NAME, METRIC-SIZE``, at the numbers that
    its blocks have in the whole one. Intervals are NaN where none are stored.

    Returns:
        Columns measure, site, layer, value, low, high, in the order probe, pruned models, damage, scores.
    """
    columns = ["measure", "site", "layer", "value", "low", "high"]
    found = []
    if run.layers is not None:
        names = tuple(dict.fromkeys(run.layers["measure"]))
        rest = sorted(set(run.layers["site"]) - set(_SITES))
        found.append(select(run.layers, names, (*_SITES, *rest)))
    found += [_shifted(run, prune) for prune in run.prunes if prune["id"] in run.shifts]
    if run.damage is not None:
        damage = run.damage.reindex(columns=["layer", "delta", "low", "high"])
        found.append(damage.rename(columns={"delta": "value"}).assign(measure="damage", site="block"))
    if run.scores is not None:
        scores = run.scores.loc[:, ["metric", "layer", "score"]].rename(columns={"score": "value"})
        names = [f"score: {name}" for name in scores["metric"]]
        found.append(scores.assign(measure=names, site="block", low=math.nan, high=math.nan))
    tables = [table.reindex(columns=columns) for table in found if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _shifted(run: Run, prune: dict[str, Any]) -> pd.DataFrame:
    """A pruned model's measures at the numbers that its blocks have in the whole one."""
    frame, drop = run.shifts[prune["id"]], {int(block) for block in prune["drop"]}
    count = _deepest(frame) + len(drop)
    kept = [block for block in range(count + 1) if block not in drop]  # what follows the blocks stays last
    names = tuple(dict.fromkeys(frame["measure"]))
    table = select(frame, names, (*_SITES, *sorted(set(frame["site"]) - set(_SITES))))
    model = f"{prune['metric']}-{len(drop)}"
    return table.assign(
        measure=[f"{name}, {model}" for name in table["measure"]],
        layer=[kept[int(layer)] for layer in table["layer"]],
    )


def explorer(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the template needs to show the measures of one or several runs over each other.

    Args:
        runs: the runs in the page's order.

    Returns:
        ``layers`` (0 … the deepest), ``blocks`` (the largest number of blocks), ``measures`` (name, whether
        it is drawn at first), ``rows`` (run, measure, site, cells) and ``plans`` (run, name, blocks, cells);
        None where no run stores anything by depth.
    """
    tables = [measures(run) for run in runs]
    depths = [_deepest(table) for table in tables if len(table)]
    if not depths:
        return None
    layers = list(range(max(depths) + 1))
    names = list(dict.fromkeys(name for table in tables for name in table["measure"]))
    first = [name for name in FIRST if name in names] or names[:3]
    rows = [row for run, table in enumerate(tables) for row in _rows(table, run, layers)]
    rows.sort(key=lambda row: (names.index(row["measure"]), row["run"]))
    return {
        "layers": layers,
        "blocks": max(_blocks(run, table) for run, table in zip(runs, tables, strict=True)),
        "runs": labels(runs),
        "measures": [{"name": name, "checked": name in first} for name in names],
        "rows": rows,
        "plans": [plan for place, run in enumerate(runs) for plan in _plans(run, place, layers)],
    }


def _rows(table: pd.DataFrame, run: int, layers: list[int]) -> list[dict[str, Any]]:
    groups: Any = table.groupby(["measure", "site"], sort=False)  # keys are typed as Hashable only
    rows = []
    for (measure, site), group in groups:
        own = {int(row["layer"]): row for row in group.to_dict("records")}
        cells = [_cell(own.get(layer)) for layer in layers]
        rows.append({"run": run, "measure": str(measure), "site": str(site), "cells": cells})
    order = {site: place for place, site in enumerate(_SITES)}
    return sorted(rows, key=lambda row: order.get(row["site"], len(order)))


def _cell(row: dict[str, Any] | None) -> dict[str, str]:
    """A value as text to read, and with its interval as the numbers that the script draws."""
    if row is None or not math.isfinite(row["value"]):
        return {"text": "–", "drawn": ""}
    parts = [row["value"]]
    if math.isfinite(row["low"]) and math.isfinite(row["high"]):
        parts += [row["low"], row["high"]]
    return {"text": number(row["value"]), "drawn": " ".join(f"{part:.5g}" for part in parts)}


def _plans(run: Run, place: int, layers: list[int]) -> list[dict[str, Any]]:
    plans = []
    for prune in run.prunes:
        drop = sorted(int(block) for block in prune["drop"])
        plans.append(
            {
                "run": place,
                "name": f"{prune['metric']}-{len(drop)}",
                "blocks": ranges(drop),
                "cells": ["×" if layer in drop else "" for layer in layers],
            }
        )
    return plans


def _blocks(run: Run, table: pd.DataFrame) -> int:
    """The number of blocks: one value of most measures stands at each, ``x[L]`` and the final norm apart."""
    if run.damage is not None and len(run.damage):
        return _deepest(run.damage) + 1
    inner = table.loc[table["measure"].isin(["grad_param", "block_influence"]) | table["site"].eq("mlp")]
    chosen = inner if len(inner) else table
    return _deepest(chosen) + 1 if len(chosen) else 0


def _deepest(table: pd.DataFrame) -> int:
    return max(int(layer) for layer in table["layer"])
