"""CSV and LaTeX (booktabs) tables of a run.

The LaTeX is a bare `tabular`, to be put into a float of the writer's own; it needs only the package booktabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from preln.report.costs import cost_groups, costs_latex
from preln.report.load import Run
from preln.report.pairing import paired_latex, paired_table
from preln.report.summary import hypothesis_name, outcomes, tasks, verdict_table
from preln.report.tables import booktabs, csv, latex_escape, number


def verdicts_latex(table: pd.DataFrame) -> str:
    """Verdicts: ID, statistic, value with interval, threshold, n, status."""
    rows = [
        [
            latex_escape(hypothesis_name(row)),
            latex_escape(row["statistic"] or ""),
            _with_interval(row["value"], row["low"], row["high"]),
            latex_escape(number(row["threshold"])),
            latex_escape(number(row["n"])),
            latex_escape(row["status"]),
        ]
        for row in table.to_dict("records")
    ]
    header = ["Hypothesis", "Statistic", "Value [95\\,\\% interval]", "Threshold", "$n$", "Verdict"]
    return booktabs(rows, header, r"lp{0.3\linewidth}rrrl")


def outcomes_latex(table: pd.DataFrame) -> str:
    """Outcomes: metric, blocks removed, recipe, loss with interval, perplexity, parameters trained, seconds.

    The lowest loss among the healed models is in bold, and so is the lowest among the pruned ones.
    """
    best = {stage: group["loss"].min() for stage, group in table.groupby("stage") if stage != "dense"}
    rows = []
    for row in table.to_dict("records"):
        loss = _with_interval(row["loss"], row["low"], row["high"])
        if row["loss"] == best.get(row["stage"]):
            loss = rf"\textbf{{{loss}}}"
        rows.append(
            [
                latex_escape(row["metric"] or "dense"),
                latex_escape(number(row["removed"])),
                latex_escape(row["recipe"] or ("none" if row["stage"] == "pruned" else "–")),
                loss,
                latex_escape(number(row["perplexity"])),
                latex_escape(number(row["trainable_parameters"])),
                latex_escape(number(row["seconds"], 3)),
            ]
        )
    header = ["Metric", "Removed", "Recipe", "Loss", "Perplexity", "Trained", "Seconds"]
    return booktabs(rows, header, "lrlrrrr")


def tasks_latex(table: pd.DataFrame) -> str:
    r"""Tasks: a row a model, a column a task, accuracy $\pm$ standard error, the best of a column in bold."""
    names = sorted(table["task"].unique())
    best: Any = table.groupby("task")["acc"].max()  # a Series, typed as a scalar too
    rows = []
    for model, group in table.groupby("model", sort=False):
        cells = group.set_index("task")
        row = [latex_escape(str(model))]
        for name in names:
            if name not in cells.index or math.isnan(cells.loc[name, "acc"]):
                row.append("--")
                continue
            acc, error = cells.loc[name, "acc"], cells.loc[name, "acc_stderr"]
            text = f"{acc:.3f}"
            if acc == best[name]:
                text = rf"\textbf{{{text}}}"
            row.append(text if math.isnan(error) else rf"{text} $\pm$ {error:.3f}")
        rows.append(row)
    return booktabs(rows, ["Model", *(latex_escape(name) for name in names)], "l" + "r" * len(names))


def run_tables(run: Run) -> dict[str, str]:
    """Every table of a run: file name (as `verdicts.tex`) to content; a table without rows is left out."""
    makers: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], str]]] = {
        "verdicts": (verdict_table(run), verdicts_latex),
        "outcomes": (outcomes(run), outcomes_latex),
        "tasks": (tasks(run), tasks_latex),
        "paired": (paired_table(run), paired_latex),
        "costs": (cost_groups(run), costs_latex),
    }
    files = {}
    for name, (table, latex) in makers.items():
        if len(table):
            files[f"{name}.csv"] = csv(table)
            files[f"{name}.tex"] = latex(table)
    return files


def _with_interval(value: float, low: float, high: float) -> str:
    text = number(value)
    if not (math.isnan(low) or math.isnan(high)):
        text += f" [{number(low)}, {number(high)}]"
    return latex_escape(text)
