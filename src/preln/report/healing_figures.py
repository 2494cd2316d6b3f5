"""Figures of what pruning cost and what healing gave back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.report.healing_study import look
from preln.report.style import (
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    PAPER,
    house_style,
    need,
    new_figure,
    scale_axis,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def outcome_chart(outcomes: pd.DataFrame, *, width: str = "single") -> Figure:
    """Loss before healing (hollow) and after it (filled), by metric and recipe; the dense loss is a line.

    Args:
        outcomes: as `preln.report.summary.outcomes` makes it.
        width: "single" or "double" column.

    Raises:
        InputError: no pruned or healed model in the table.
    """
    table: pd.DataFrame = outcomes.loc[outcomes["stage"] != "dense"]
    need(len(table), "a pruned or healed model")
    several_counts = table.loc[:, "removed"].nunique() > 1
    recipes = sorted(set(table["recipe"]) - {""})
    looks = {recipe: look(i) for i, recipe in enumerate(recipes)}
    colours = {recipe: own["color"] for recipe, own in looks.items()}
    markers = {recipe: own["marker"] for recipe, own in looks.items()}
    lines, ticks, y = [], [], 0.0
    with house_style():
        groups: Any = table.groupby(["removed", "metric"], sort=False)  # keys are typed as Hashable only
        for (removed, metric), group in groups:
            raw = group.loc[group["stage"] == "pruned", "loss"]
            healed = group[group["stage"] == "healed"]
            name = f"{short(str(metric))} −{removed}" if several_counts else short(str(metric))
            ticks.append((y + 0.5 * max(len(healed) - 1, 0), name))
            for _, row in healed.iterrows() if len(healed) else [(None, None)]:
                lines.append((y, raw.iloc[0] if len(raw) else math.nan, row))
                y += 1.0
            y += 0.7
        figure, axes = new_figure(width, max(1.9, 0.155 * y + 0.95))
        axis = axes[0, 0]
        for position, before, row in lines:
            if row is not None:
                after, colour = row["loss"], colours[row["recipe"]]
                axis.plot([before, after], [position, position], color=colour, linewidth=1.0)
                axis.plot(
                    [row["low"], row["high"]], [position, position], color=colour, linewidth=2.6, alpha=0.45
                )
                axis.plot(
                    [after],
                    [position],
                    color=colour,
                    marker=markers[row["recipe"]],
                    zorder=3,  # a recipe that healed next to nothing must not vanish under the hollow mark
                    markersize=4.5,
                    linestyle="none",
                )
            axis.plot(
                [before],
                [position],
                marker="o",
                markersize=4,
                color=INK,
                markerfacecolor=PAPER,
                linestyle="none",
                markeredgewidth=0.8,
            )
        dense = outcomes.loc[outcomes["stage"] == "dense", "loss"]
        values = [*table["loss"], *dense]
        if len(dense):
            axis.axvline(dense.iloc[0], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
        scale_axis(axis.xaxis, values)
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        axis.set_ylim(y - 0.2, -1.0)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("held-out loss (nats a token)")
        _outcome_legend(figure, recipes, colours, markers, dense=bool(len(dense)), width=width)
        return figure


def healing_curves(
    training: pd.DataFrame, dense_loss: float | None = None, *, x: str = "tokens", width: str = "single"
) -> Figure:
    """Validation loss during healing; colour is the recipe, dashes and marker the metric.

    Args:
        training: id, metric, recipe, tokens (or seconds), split, loss.
        dense_loss: drawn as a reference line.
        x: "tokens" or "seconds".
        width: "single" or "double" column.

    Raises:
        InputError: no validation loss in the table.
    """
    table = curve_table(training)
    need(len(table), "validation losses")
    recipes, metrics = sorted(table["recipe"].unique()), sorted(table["metric"].unique())
    with house_style():
        figure, axes = new_figure(width, 3.2 if width == "single" else 2.8)
        axis = axes[0, 0]
        for _, rows in table.groupby("id", sort=True):
            recipe, metric = rows["recipe"].iloc[0], rows["metric"].iloc[0]
            colour = CYCLE[recipes.index(recipe) % len(CYCLE)]
            style, marker = (
                DASHES[metrics.index(metric) % len(DASHES)],
                MARKERS[metrics.index(metric) % len(MARKERS)],
            )
            rows = rows.sort_values(x)
            axis.plot(rows[x], rows["loss"], color=colour, linestyle=style, marker=marker, markersize=2.5)
        values = list(table["loss"])
        if dense_loss is not None:
            axis.axhline(dense_loss, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
            values.append(dense_loss)
        scale_axis(axis.yaxis, values)
        axis.set_xlabel({"tokens": "tokens trained on", "seconds": "seconds of healing"}[x])
        axis.set_ylabel("validation loss (nats a token)")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _curve_legend(figure, recipes, metrics, dense=dense_loss is not None, width=width)
        return figure


def curve_table(training: pd.DataFrame) -> pd.DataFrame:
    """The validation rows of the training tables."""
    return training.loc[training["split"] == "validation"].sort_values(["id", "step"], ignore_index=True)


def _outcome_legend(
    figure: Figure,
    recipes: list[str],
    colours: dict[str, str],
    markers: dict[str, str],
    *,
    dense: bool,
    width: str,
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker="o",
            markersize=4,
            color=INK,
            markerfacecolor=PAPER,
            linestyle="none",
            label="not healed",
        )
    ]
    handles += [
        Line2D(
            [],
            [],
            marker=markers[recipe],
            color=colours[recipe],
            markersize=4.5,
            label=short(recipe, 24),
        )
        for recipe in recipes
    ]
    if dense:
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label="dense"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if width == "single" else 4)


def _curve_legend(figure: Figure, recipes: list[str], metrics: list[str], *, dense: bool, width: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=CYCLE[i % len(CYCLE)], linewidth=2.5, label=short(name, 24))
        for i, name in enumerate(recipes)
    ]
    handles += [
        Line2D(
            [],
            [],
            color=INK,
            linestyle=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            label=short(name, 24),
        )
        for i, name in enumerate(metrics)
    ]
    if dense:
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label="dense"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 if width == "single" else 4,
        handlelength=2.6,
        columnspacing=1.2,
    )
