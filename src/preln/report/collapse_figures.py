"""How loss and accuracy give way as more blocks go, before healing and after it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.report.healing_study import look
from preln.report.load import Run
from preln.report.spec import FigureSpec
from preln.report.style import INK, PAPER, house_style, need, new_figure, scale_axis, short
from preln.report.summary import dense_loss, numeric, outcomes
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ["panel", "metric", "stage", "removed", "value", "low", "high"]
SIZES = 3  # fewer sizes make no curve


def collapse_table(run: Run) -> pd.DataFrame:
    """Loss, and accuracy where it was measured, by criterion and number of removed blocks.

    Returns:
        Columns `COLUMNS`: `panel` is loss (nats a token) or accuracy (plain mean over the tasks); `stage` is
        dense, pruned or healed, the recipe of least loss where several healed the same model; `low` and
        `high` bound the 95 % interval. No rows unless some criterion removed three numbers of blocks.
    """
    table = outcomes(run)
    table = table.loc[table["loss"].notna() & (table["stage"] != "dense")]
    best = table.loc[table.groupby(["stage", "metric", "removed"])["loss"].idxmin()]
    losses = best.rename(columns={"loss": "value"}).assign(panel="loss")
    rows = pd.concat([losses.loc[:, COLUMNS], _accuracies(run)], ignore_index=True)
    sizes: Any = losses.groupby("metric")["removed"].nunique()  # a Series, typed as a number too
    kept = sizes.index[sizes >= SIZES]
    found: pd.DataFrame = rows.loc[rows["metric"].isin(list(kept))]
    if found.empty:
        return found
    dense = dense_loss(run)
    first = [] if dense is None else [("loss", dense, math.nan, math.nan)]
    accuracy = next((e for e in run.evaluations if e["id"] == "evaluate-dense"), None)
    if accuracy is not None and "accuracy" in set(found["panel"]):
        first.append(("accuracy", *_mean_accuracy(accuracy)))
    start = [(panel, "", "dense", 0, *values) for panel, *values in first]
    whole = pd.concat([pd.DataFrame(start, columns=COLUMNS), found], ignore_index=True)
    return whole.sort_values(["panel", "metric", "stage", "removed"], ignore_index=True, kind="stable")


def _accuracies(run: Run) -> pd.DataFrame:
    """Mean accuracy of every pruned and healed model that was put to the tasks."""
    models = {record["id"]: ("pruned", record) for record in run.prunes}
    models |= {record["id"]: ("healed", record) for record in run.heals}
    rows = []
    for evaluation in run.evaluations:
        stage, record = models.get(str(evaluation.get("model")), ("", {}))
        if stage:
            spot = (record["metric"], stage, len(record["drop"]))
            rows.append(("accuracy", *spot, *_mean_accuracy(evaluation)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _mean_accuracy(evaluation: dict[str, Any]) -> tuple[float, float, float]:
    """Plain mean over the tasks with a 95 % interval from their standard errors."""
    tasks = list(evaluation["tasks"].values())
    mean = sum(numeric(task["acc"]) for task in tasks) / len(tasks)
    error = math.sqrt(sum(numeric(task["acc_stderr"]) ** 2 for task in tasks)) / len(tasks)
    return mean, mean - 1.96 * error, mean + 1.96 * error


def collapse_curves(table: pd.DataFrame, *, width: str = "double") -> Figure:
    """Loss, and accuracy beside it, against the number of removed blocks.

    Args:
        table: From :func:`collapse_table`.
        width: "single" (panels one below the other) or "double" column.

    Raises:
        InputError: The table has no rows.
    """
    need(len(table), f"criterion that removed {SIZES} numbers of blocks")
    panels = [name for name in ("loss", "accuracy") if name in set(table["panel"])]
    metrics = sorted(set(table.loc[table["stage"] != "dense", "metric"]))
    stacked = width == "single"
    with house_style():
        shape = {"nrows": len(panels)} if stacked else {"ncols": len(panels)}
        figure, axes = new_figure(width, 2.3 * len(panels) + 0.4 if stacked else 2.9, **shape)
        for axis, panel in zip(axes.flat, panels, strict=True):
            rows = table.loc[table["panel"] == panel]
            dense = rows.loc[rows["stage"] == "dense"]
            for place, metric in enumerate(metrics):
                for stage, style in (("pruned", (0, (1, 1.5))), ("healed", "-")):
                    own = rows.loc[(rows["metric"] == metric) & (rows["stage"] == stage)]
                    line = pd.concat([dense, own]) if stage == "pruned" and len(own) else own
                    fill = PAPER if stage == "pruned" else look(place)["color"]
                    axis.plot(
                        line["removed"],
                        line["value"],
                        **look(place) | {"linestyle": style, "markerfacecolor": fill},
                        label=f"{short(metric)}{', healed' if stage == 'healed' else ''}"
                        if len(own)
                        else None,
                    )
                    if panel == "accuracy" and len(own):
                        errors = [own["value"] - own["low"], own["high"] - own["value"]]
                        spot = look(place)["color"]
                        axis.errorbar(
                            own["removed"], own["value"], yerr=errors, fmt="none", ecolor=spot, elinewidth=0.6
                        )
            if len(dense):
                axis.axhline(
                    dense["value"].iloc[0], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0
                )
            scale_axis(axis.yaxis, rows["value"].to_numpy(float))
            axis.set_xlabel("blocks removed")
            axis.set_ylabel("held-out loss (nats a token)" if panel == "loss" else "mean accuracy")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if stacked else 4)
        return figure


def _table(run: Run) -> pd.DataFrame | None:
    table = collapse_table(run)
    return table if len(table) else None


def _describe(table: pd.DataFrame) -> str:
    said = []
    rows = table.loc[(table["panel"] == "loss") & (table["stage"] != "dense")]
    groups: Any = rows.groupby(["metric", "stage"], sort=True)  # keys are typed as Hashable only
    for (metric, stage), own in groups:
        first, last = own.iloc[0], own.iloc[-1]
        said.append(
            f"{metric}, {stage}: loss {number(first['value'])} without {first['removed']} blocks, "
            f"{number(last['value'])} without {last['removed']}"
        )
    return "; ".join(said) + "."


COLLAPSE = FigureSpec(
    "collapse-curves",
    "Loss and accuracy as more blocks go",
    "Dotted lines with hollow marks are models that are cut only, full lines are healed ones (by the recipe "
    "of least loss where there are several); the dashed line is the whole model. Bars are 95 % intervals.",
    _table,
    lambda run, width: collapse_curves(collapse_table(run), width=width),
    _describe,
)
