"""Recipes side by side: losses against tokens, at each one's best rate, and against the rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.report.findings import verdict_rows
from preln.report.load import Run, load_run
from preln.report.markdown import cell
from preln.report.style import CYCLE, DASHES, INK, MARKERS, house_style, need, new_figure, scale_axis
from preln.report.summary import dense_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_COLUMNS = [
    *("id", "model", "recipe", "learning_rate", "seed", "loss", "loss_before", "validation"),
    *("tokens", "seconds", "peak_memory_bytes", "trainable_parameters"),
]
RECIPE_COLUMNS = [
    *("model", "recipe", "learning_rate", "best", "loss", "low", "high", "seeds", "loss_before"),
    *("tokens", "seconds", "peak_memory_bytes", "trainable_parameters"),
]


def healing_runs(run: Run) -> pd.DataFrame:
    """Every healing run of a study, one row each; losses in nats, ``validation`` chose the rates.

    ``seconds`` are those of the updates, each counted as the median of the run's, so that a pause of the
    machine does not count.
    """
    updates = update_seconds(run.training)
    rows = [
        {
            **{name: heal.get(name) for name in RUN_COLUMNS},
            "model": f"{heal['metric']}-{len(heal['drop'])}",
            "recipe": heal.get("base_recipe", heal["recipe"]),
            "loss": heal["loss_after"],
            "validation": heal.get("validation_after"),
            "seconds": updates[heal["id"]] * heal["steps"]
            if heal["id"] in updates and "steps" in heal
            else heal.get("seconds", math.nan),
        }
        for heal in run.heals
    ]
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def update_seconds(training: pd.DataFrame | None) -> dict[str, float]:
    """Median seconds of an update of every run, by its step."""
    if training is None or "seconds" not in training:
        return {}
    rows = training.loc[training["split"] == "train"]
    groups: Any = rows.groupby("id")["seconds"]  # keys are typed as Hashable only
    return {str(name): float(np.median(np.diff(own.to_numpy(float), prepend=0.0))) for name, own in groups}


def recipe_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row a model, recipe and rate.

    Returns:
        Columns `RECIPE_COLUMNS`; `low` and `high` are the least and the greatest loss of the seeds, `best`
        marks the rate of a recipe with the lowest mean validation loss.
    """
    rows = []
    for (model, recipe), own in _grouped(runs, ["model", "recipe"]):
        means = own.groupby("learning_rate")["validation"].mean()
        chosen = float(means.idxmin())
        for rate, group in _grouped(own, ["learning_rate"]):
            told = {"model": model, "recipe": recipe, "learning_rate": rate, "best": rate == chosen}
            losses = group["loss"].to_numpy(np.float64)
            told |= {"loss": losses.mean(), "low": losses.min(), "high": losses.max(), "seeds": len(group)}
            kept = RECIPE_COLUMNS[RECIPE_COLUMNS.index("loss_before") :]
            rows.append(told | {name: float(group[name].mean()) for name in kept})
    return pd.DataFrame(rows, columns=RECIPE_COLUMNS)


def _grouped(table: pd.DataFrame, by: list[str]) -> Any:
    """Groups in order of appearance; one key is a plain value."""
    return table.groupby(by if len(by) > 1 else by[0], sort=False)


def healing_study(run: Run, *, width: str = "double") -> Figure:
    """One row a pruned model: its recipes against tokens, and against the learning rate.

    On the left the validation loss, each recipe at its best rate, the mean over seeds with a band from the
    least to the greatest; on the right the held-out loss.

    Args:
        run: A run whose healing steps say recipe, rate and seed.
        width: "single" or "double" column.

    Raises:
        InputError: No healed model.
    """
    runs = healing_runs(run)
    need(len(runs), "a healed model")
    means, dense = recipe_means(runs), dense_loss(run)
    models, recipes = list(dict.fromkeys(runs["model"])), list(dict.fromkeys(sorted(runs["recipe"])))
    looks = {name: look(place) for place, name in enumerate(recipes)}
    with house_style():
        figure, axes = new_figure(width, 0.7 + 2.5 * len(models), nrows=len(models), ncols=2)
        for (left, right), model in zip(axes, models, strict=True):
            own = means.loc[means["model"] == model]
            before = float(own["loss_before"].iloc[0])
            shown = [before, *own["loss"], *([] if dense is None else [dense])]
            for recipe in recipes:
                _curves(left, run, runs, own, model, recipe, looks[recipe])
                mine = own.loc[own["recipe"] == recipe].sort_values(by="learning_rate")
                middle = mine["loss"].to_numpy()
                spread = [middle - mine["low"].to_numpy(), mine["high"].to_numpy() - middle]
                right.errorbar(mine["learning_rate"], middle, yerr=spread, **looks[recipe])
            for axis, title in ((left, "at its best rate"), (right, "by learning rate")):
                axis.set_title(f"{model.replace('_', ' ')}: {title}")
                axis.axhline(before, color=INK, linewidth=0.8, linestyle=":")
                if dense is not None:
                    axis.axhline(dense, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
                scale_axis(axis.yaxis, shown)
            left.set_xlabel("tokens trained on")
            left.set_ylabel("validation loss (nats a token)")
            right.set_ylabel("held-out loss (nats a token)")
            right.set_xscale("log")
            # text is plain in the house's style: powers of ten as a rate is typed
            right.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-"))
            right.set_xlabel("learning rate")
        recipe_legend(
            figure, looks, before=True, dense=dense is not None, columns=3 if width == "single" else 7
        )
        return figure


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the curve in this place: no two alike among the first 36."""
    step = place // len(CYCLE)
    return {
        "color": CYCLE[place % len(CYCLE)],
        "marker": MARKERS[(place + step) % len(MARKERS)],
        "linestyle": DASHES[step % len(DASHES)],
        "markersize": 3,
        "linewidth": 1.0,
    }


def _curves(
    axis: Axes,
    run: Run,
    runs: pd.DataFrame,
    means: pd.DataFrame,
    model: str,
    recipe: str,
    look: dict[str, Any],
) -> None:
    """One recipe at its best rate on one model."""
    best = means.loc[(means["recipe"] == recipe) & means["best"]]
    if best.empty or run.training is None:
        return
    chosen = (runs["model"] == model) & (runs["recipe"] == recipe)
    ids = runs.loc[chosen & (runs["learning_rate"] == best["learning_rate"].iloc[0]), "id"]
    rows = run.training.loc[run.training["id"].isin(list(ids)) & (run.training["split"] == "validation")]
    found = rows.groupby("tokens")["loss"].agg(["mean", "min", "max"])
    axis.plot(found.index, found["mean"], **look)
    axis.fill_between(found.index, found["min"], found["max"], color=look["color"], alpha=0.2, linewidth=0)


def recipe_legend(
    figure: Figure, looks: dict[str, dict[str, Any]], *, before: bool, dense: bool, columns: int
) -> None:
    """Below the figure: the look of each recipe, of the loss before healing and of the dense one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    if before:
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=":", label="not healed"))
    if dense:
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label="not pruned"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def parts(folder: str | Path) -> dict[str, str]:
    """The generated parts of the page of healing, by the name of their markers.

    Args:
        folder: An exported run.
    """
    run = load_run(folder)
    means = recipe_means(healing_runs(run))
    return {
        "healing-provenance": _provenance(run),
        "healing-verdicts": verdict_rows(run),
        "healing-recipes": _recipes(run, means),
        "healing-rates": _rates(means),
    }


def _provenance(run: Run) -> str:
    manifest, data = run.manifest, run.config["data"]
    told = {name: f"{part['sequences']} × {part['length']}" for name, part in data.items()}
    source = manifest["data"]["healing"]["source"]
    kind = source if isinstance(source, str) else source.get("source", source.get("kind", "rows"))
    dense = dense_loss(run) or float("nan")
    return cell(
        f"{manifest['model']['name']}, {manifest['dtype']} on {manifest['device']}, tokens of {kind}: "
        f"{told['healing']} to heal on, rates chosen on {told['healing_validation']} others, losses on "
        f"{told['evaluation']} more (validation split), where the whole model has {dense:.3f} nats; "
        f"commit `{str(manifest['git']['commit'])[:12]}`."
    )


def _recipes(run: Run, means: pd.DataFrame) -> str:
    best = means.loc[means["best"]].sort_values(by=["model", "loss"], kind="stable")
    lines = [
        "| model | recipe | best rate | loss before | loss after [least, greatest of the seeds] | "
        "parameters | s for the updates | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in best.to_dict("records"):
        lines.append(
            f"| `{row['model']}` | `{row['recipe']}` | {row['learning_rate']:g} | {row['loss_before']:.3f} | "
            f"{row['loss']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | "
            f"{row['trainable_parameters'] / 1e6:.2f} M | {row['seconds']:.0f} | "
            f"{row['peak_memory_bytes'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def _rates(means: pd.DataFrame) -> str:
    rates = sorted(means["learning_rate"].unique())
    lines = [
        "| model | recipe | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 2) + "|",
    ]
    for (model, recipe), own in _grouped(means, ["model", "recipe"]):
        table = own.set_index("learning_rate")
        cells = [_loss(table, rate) for rate in rates]
        if sum(map(bool, cells)) > 1:
            lines.append(f"| `{model}` | `{recipe}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss(table: pd.DataFrame, rate: float) -> str:
    if rate not in table.index:
        return ""
    text = f"{table.loc[rate, 'loss']:.3f}"
    return f"**{text}**" if bool(table.loc[rate, "best"]) else text
