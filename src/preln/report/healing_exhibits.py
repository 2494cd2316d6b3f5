"""The page's figures of healing: losses before and after, and curves against tokens and against seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from preln.report.healing_figures import curve_table, healing_curves, outcome_chart
from preln.report.healing_means import crowded, healing_panels, mean_curves, mean_outcomes
from preln.report.load import Run
from preln.report.spec import FigureSpec
from preln.report.summary import outcomes
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shown_outcomes(run: Run) -> pd.DataFrame:
    """The outcomes as drawn: every run, or means at the best rate where there are too many."""
    return mean_outcomes(run) if crowded(run) else outcomes(run)


def _outcomes(run: Run) -> pd.DataFrame | None:
    table = shown_outcomes(run)
    return table if (table.loc[:, "stage"] != "dense").any() else None


def _curves(run: Run) -> pd.DataFrame | None:
    if run.training is None:
        return None
    return mean_curves(run) if crowded(run) else curve_table(run.training)


def _timed(run: Run) -> pd.DataFrame | None:
    table = _curves(run)
    timed = table is not None and "seconds" in table and bool(table["seconds"].notna().any())
    return table if timed else None


def _draw(run: Run, width: str, x: str) -> Figure:
    assert run.training is not None  # drawn only where its table was found
    if crowded(run):
        return healing_panels(mean_curves(run), x=x, width=width)
    return healing_curves(run.training, x=x, width=width)


def _describe_outcomes(table: pd.DataFrame) -> str:
    parts = []
    for stage, words in (
        ("dense", "dense"),
        ("pruned", "least loss before healing"),
        ("healed", "least after healing"),
    ):
        rows: pd.DataFrame = table.loc[(table["stage"] == stage) & table["loss"].notna()]
        if len(rows):
            row = rows.loc[rows["loss"].idxmin()]
            how = ", ".join(name for name in (row["metric"], row["recipe"]) if name)
            parts.append(f"{words} {number(row['loss'])}" + (f" ({how})" if how else ""))
    return "; ".join(parts) + "."


def _describe_curves(table: pd.DataFrame) -> str:
    return _each_curve(table, lambda rows: f"goes from {number(rows['loss'].iloc[0])} to {_last(rows)}")


def _describe_timed(table: pd.DataFrame) -> str:
    return _each_curve(
        table, lambda rows: f"reaches {_last(rows)} in {number(float(rows['seconds'].iloc[-1]), 3)} s"
    )


def _each_curve(table: pd.DataFrame, words: Callable[[pd.DataFrame], str]) -> str:
    parts = [
        f"{rows['recipe'].iloc[0]} after {rows['metric'].iloc[0]} {words(rows)}"
        for _, rows in table.groupby("id", sort=True)
    ]
    return "; ".join(parts) + "."


def _last(rows: pd.DataFrame) -> str:
    return number(rows["loss"].iloc[-1])


_MEANS = (
    " Where a study has many rates or seeds, each recipe stands at its best rate by validation loss, as the "
    "mean of its seeds, with their least and greatest as its band."
)
_LOSS = "Loss on the texts that healing validates on, which are not those of the table of outcomes, against "

HEALING_FIGURES = (
    FigureSpec(
        "outcomes",
        "Loss before and after healing",
        "Hollow: pruned, before healing. Filled: after healing, with its 95 % interval. Dashed: the "
        "dense model. Where a study has many rates or seeds, the mean of the seeds at the best rate, with "
        "their least and greatest.",
        _outcomes,
        lambda run, width: outcome_chart(shown_outcomes(run), width=width),
        _describe_outcomes,
    ),
    FigureSpec(
        "healing-curves",
        "Healing curves against tokens",
        f"{_LOSS}tokens trained on. Colour tells the recipe; dashes and marker, or the panel, tell the "
        f"metric.{_MEANS}",
        _curves,
        lambda run, width: _draw(run, width, "tokens"),
        _describe_curves,
    ),
    FigureSpec(
        "healing-curves-seconds",
        "Healing curves against seconds",
        f"{_LOSS}the seconds that the updates took on the machine of the run: the same curves as against "
        "tokens, with what a recipe costs in them.",
        _timed,
        lambda run, width: _draw(run, width, "seconds"),
        _describe_timed,
    ),
)
