"""Several runs in one page: what each decided, and what each scored, in common tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from preln.report.healing_exhibits import shown_outcomes
from preln.report.load import Run
from preln.report.summary import tasks
from preln.report.tables import number
from preln.report.views import task_grid


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with a number where two folders have the same one.

    >>> from pathlib import Path
    >>> labels([Run(Path("a/q"), "q", {}, {}, ()), Run(Path("b/q"), "q", {}, {}, ())])
    ['q', 'q (2)']
    """
    found: list[str] = []
    for run in runs:
        name, count = run.name, 1
        while name in found:
            count += 1
            name = f"{run.name} ({count})"
        found.append(name)
    return found


def side_by_side(runs: Sequence[Run], views: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Verdicts, losses and tasks of several runs beside each other; None for a single run.

    Args:
        runs: the runs.
        views: what the page shows of each, for its verdict cards and anchors.

    Returns:
        ``names``; ``verdicts``, a row a hypothesis with one cell a run (None where it was not asked);
        ``losses``, a row a run; ``tasks``, a grid whose models carry their run's name.
    """
    if len(runs) < 2:
        return None
    names = labels(runs)
    cards = [{card["name"]: card for card in view["verdicts"]} for view in views]
    asked = dict.fromkeys(name for own in cards for name in own)
    tables = [
        tasks(run).assign(model=lambda table, name=name: name + ": " + table["model"].astype(str))
        for run, name in zip(runs, names, strict=True)
    ]
    return {
        "names": names,
        "verdicts": [{"name": name, "cells": [own.get(name) for own in cards]} for name in asked],
        "losses": [_losses(run, name, view) for run, name, view in zip(runs, names, views, strict=True)],
        "tasks": task_grid(pd.concat(tables, ignore_index=True)),
    }


def _losses(run: Run, name: str, view: dict[str, Any]) -> dict[str, str]:
    """The dense loss and the best of each stage, with what reached it."""
    table = shown_outcomes(run)
    row = {"name": name, "href": f"#{view['prefix']}"}
    for stage in ("dense", "pruned", "healed"):
        own: pd.DataFrame = table.loc[(table["stage"] == stage) & table["loss"].notna()]
        row[stage] = "–"
        if len(own):
            best = own.loc[own["loss"].idxmin()]
            how = ", ".join(str(best[key]) for key in ("metric", "recipe") if best[key])
            row[stage] = number(best["loss"]) + (f" ({how}, −{best['removed']})" if how else "")
    return row
