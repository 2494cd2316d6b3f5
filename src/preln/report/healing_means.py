"""Many healing runs as few curves: each recipe at its best rate on each pruned model, means over seeds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.report.healing_study import RECIPE_COLUMNS, healing_runs, look, recipe_legend, recipe_means
from preln.report.load import Run
from preln.report.style import CYCLE, INK, house_style, need, new_figure, scale_axis, short
from preln.report.summary import OUTCOME_COLUMNS, outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 12
"""More healing runs than this, with rates among them to choose from, are shown at their best rates."""

_TABLE = ["id", "metric", "removed", "recipe", "learning_rate", "seeds", "step", "tokens", "seconds"]


def crowded(run: Run) -> bool:
    """Whether to show means at best rates: there are seeds, or more runs than can be told apart."""
    runs = healing_runs(run)
    seeds = bool(runs.duplicated(["model", "recipe", "learning_rate"]).any())
    rates = bool(runs.duplicated(["model", "recipe"]).any())
    names = {str(heal["recipe"]) for heal in run.heals}
    return seeds or (len(runs) > MANY and rates) or len(names) > len(CYCLE)


def best_rates(run: Run) -> pd.DataFrame:
    """Each recipe at its best rate on each pruned model; the rate is chosen by validation loss.

    Returns:
        The rows of :func:`preln.report.healing_study.recipe_means` that it marks as best. A run that does
        not say its validation loss counts with the last one of its curve.
    """
    runs = healing_runs(run)
    if not len(runs):
        return pd.DataFrame(columns=RECIPE_COLUMNS)
    curves = _validation(run)
    ends = dict(zip(curves["id"], curves["loss"], strict=True))  # in order of steps: the last one stays
    known: Any = pd.to_numeric(runs.loc[:, "validation"], errors="coerce")
    lasts = pd.Series([ends.get(name, math.inf) for name in runs["id"]], index=runs.index)
    runs["validation"] = known.fillna(lasts)
    runs["learning_rate"] = _rates(runs)
    means = recipe_means(runs)
    return means.loc[means["best"].astype(bool)].reset_index(drop=True)


def mean_curves(run: Run) -> pd.DataFrame:
    """Validation loss at each step: the mean over seeds of each recipe at its best rate.

    Returns:
        id (such as ``reverse-8-lora``), metric, removed, recipe, learning_rate, seeds, step, tokens, seconds
        (means over seeds), loss (mean), low and high (least and greatest of the seeds).
    """
    runs, curves, rows = healing_runs(run), _validation(run), []
    rates = _rates(runs)
    for best in best_rates(run).to_dict("records"):
        own = (runs["model"] == best["model"]) & (runs["recipe"] == best["recipe"])
        ids = list(runs.loc[own & (rates == best["learning_rate"]), "id"])
        for step, found in curves.loc[curves["id"].isin(ids)].groupby("step"):
            told = {"id": f"{best['model']}-{best['recipe']}", "metric": found["metric"].iloc[0]}
            told |= {name: best[name] for name in ("recipe", "learning_rate", "seeds")}
            told |= {"removed": found["removed"].iloc[0], "step": step, "tokens": found["tokens"].mean()}
            losses = found["loss"]
            told |= {"loss": losses.mean(), "low": losses.min(), "high": losses.max()}
            rows.append(told | {"seconds": found["seconds"].mean() if "seconds" in found else math.nan})
    return pd.DataFrame(rows, columns=[*_TABLE, "loss", "low", "high"])


def mean_outcomes(run: Run) -> pd.DataFrame:
    """As :func:`preln.report.summary.outcomes`, with one row a recipe: its best rate, the mean over seeds.

    ``low`` and ``high`` of a healed row are the least and the greatest loss of its seeds; of one seed, they
    are the ends of its interval.
    """
    table = outcomes(run)
    best = best_rates(run)
    rows: list[dict[str, Any]] = []
    for row in table.loc[table["stage"] != "healed"].to_dict("records"):
        rows.append(row)
        own: pd.DataFrame = best.loc[best["model"] == f"{row['metric']}-{row['removed']}"]
        for found in own.sort_values("recipe").to_dict("records"):
            told = {name: row[name] for name in ("metric", "removed", "blocks", "dense_loss")}
            told |= {name: found.get(name, math.nan) for name in OUTCOME_COLUMNS if name not in told}
            told |= {"stage": "healed", "learning_rate": found["learning_rate"] or math.nan}
            told |= _interval(table, told) if found["seeds"] == 1 else {}
            rows.append(told | {"perplexity": math.exp(min(found["loss"], 700.0))})
    return pd.DataFrame(rows, columns=OUTCOME_COLUMNS)


def _interval(table: pd.DataFrame, row: dict[str, Any]) -> dict[str, Any]:
    """The interval of the only run that a row is about; nothing where it is not told apart."""
    own = table.loc[(table["stage"] == "healed") & (table["loss"] == row["loss"])]
    for name in ("metric", "removed"):
        own = own.loc[own[name] == row[name]]
    return own[["low", "high"]].iloc[0].to_dict() if len(own) == 1 else {}


def healing_panels(
    table: pd.DataFrame, dense_loss: float | None = None, *, x: str = "tokens", width: str = "single"
) -> Figure:
    """One panel a pruned model, one curve a recipe with the spread of its seeds as a band.

    Args:
        table: as :func:`mean_curves` makes it.
        dense_loss: drawn as a reference line.
        x: "tokens" or "seconds".
        width: "single" or "double" column.

    Raises:
        InputError: the table has no rows.
    """
    need(len(table), "validation losses")
    models = list(dict.fromkeys(zip(table["metric"], table["removed"], strict=True)))
    recipes = sorted(set(table["recipe"]))
    looks = {name: look(place) for place, name in enumerate(recipes)}
    across = 1 if width == "single" else min(2, len(models))
    rows = math.ceil(len(models) / across)
    lines = math.ceil((len(recipes) + 1) / (2 if width == "single" else 5))
    with house_style():
        figure, axes = new_figure(
            width, 2.2 * rows + 0.3 + 0.14 * lines, nrows=rows, ncols=across, sharex=True
        )
        for place, (axis, (metric, removed)) in enumerate(zip(axes.flat, models, strict=False)):
            own = table.loc[(table["metric"] == metric) & (table["removed"] == removed)]
            for recipe, curve in own.groupby("recipe", sort=True):
                curve = curve.sort_values(x)
                axis.plot(curve[x], curve["loss"], **looks[str(recipe)])
                ends = [curve[name].to_numpy(float) for name in (x, "low", "high")]
                axis.fill_between(*ends, color=looks[str(recipe)]["color"], alpha=0.2, linewidth=0)
            if dense_loss is not None:
                axis.axhline(dense_loss, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
            scale_axis(axis.yaxis, [*own["loss"], *([] if dense_loss is None else [dense_loss])])
            axis.set_title(f"{short(str(metric))} −{removed}", loc="left")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            if place % across == 0:
                axis.set_ylabel("validation loss (nats a token)")
            if place + across >= len(models):  # nothing stands below it
                axis.set_xlabel({"tokens": "tokens trained on", "seconds": "seconds of healing"}[x])
                axis.tick_params(axis="x", labelbottom=True)
        for axis in list(axes.flat)[len(models) :]:
            axis.set_visible(False)
        columns = 2 if width == "single" else 5
        recipe_legend(figure, looks, before=False, dense=dense_loss is not None, columns=columns)
        return figure


def _rates(runs: pd.DataFrame) -> pd.Series:
    """The learning rates, 0 for a run that does not say: it is a rate of its own all the same."""
    rates: Any = pd.to_numeric(runs["learning_rate"], errors="coerce")
    return rates.fillna(0.0)


def _validation(run: Run) -> pd.DataFrame:
    if run.training is None:
        return pd.DataFrame(columns=["id", "step", "loss"])
    rows = run.training.loc[run.training["split"] == "validation"]
    return rows.sort_values(["id", "step"], ignore_index=True)
