"""Figures of a placement study: what the norm's place does to gradients, to angles and to prunable depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from preln.base.errors import InputError
from preln.report.load import Run
from preln.report.spec import FigureSpec
from preln.report.style import CYCLE, DASHES, MARKERS, block_axis, house_style, need, new_figure, scale_axis
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"pre": "Pre-LN", "post": "Post-LN", "sandwich": "sandwich", "scaled": "Pre-LN scaled by 1/√l"}
PANELS = {
    "gradient": ("gradient |∂L/∂x[l]|", "depth l"),
    "angle": ("angle from x[l] to x[l+1] over π", "block l"),
    "loss": ("loss, deepest removed, nats", "blocks removed"),
}


def placement_table(depth: pd.DataFrame, removals: pd.DataFrame, *, state: str = "trained") -> pd.DataFrame:
    """The numbers of the three panels: panel, placement, layer, value (mean over seeds), low, high, n.

    ``low`` and ``high`` are the least and the largest seed's: with three seeds a range says all there is.

    Args:
        depth: placement, seed, state, measure, layer, value.
        removals: placement, seed, order, last_kept, removed, loss.
        state: "initial" or "trained", for gradients and angles; only trained models are pruned.
    """
    parts = []
    for panel, measure in (("gradient", "grad_hidden"), ("angle", "angular_distance")):
        rows = depth.loc[(depth["measure"] == measure) & (depth["state"] == state)]
        parts.append(rows.assign(panel=panel).loc[:, ["panel", "placement", "seed", "layer", "value"]])
    rows = removals.loc[(removals["order"] == "deepest") & ~removals["last_kept"].astype(bool)]
    rows = rows.rename(columns={"removed": "layer", "loss": "value"}).assign(panel="loss")
    parts.append(rows.loc[:, ["panel", "placement", "seed", "layer", "value"]])
    groups = pd.concat(parts, ignore_index=True).groupby(["panel", "placement", "layer"], sort=False)["value"]
    return groups.agg(value="mean", low="min", high="max", n="size").reset_index()


def norm_placement(table: pd.DataFrame, *, width: str = "double") -> Figure:
    """Gradient by depth, angle between neighbours by depth, loss against removed blocks; a line a placement.

    Args:
        table: From :func:`placement_table`.
        width: "single" (panels one below the other) or "double" column.

    Raises:
        InputError: The table has no rows, or a placement that is not known.
    """
    need(len(table), "models of a placement study")
    placements = list(dict.fromkeys(table["placement"]))
    if unknown := [name for name in placements if name not in LABELS]:
        raise InputError(f"placement {unknown[0]!r}: unknown: use one of {', '.join(LABELS)}")
    panels = [name for name in PANELS if name in set(table["panel"])]
    with house_style():
        stacked = width == "single"
        shape = {"nrows": len(panels)} if stacked else {"ncols": len(panels)}
        figure, axes = new_figure(width, 1.9 * len(panels) + 0.4 if stacked else 2.6, **shape)
        for axis, panel in zip(axes.flat, panels, strict=True):
            rows = table.loc[table["panel"] == panel]
            for place, name in enumerate(LABELS):
                line = rows.loc[rows["placement"] == name].sort_values("layer")
                if line.empty:
                    continue
                axis.plot(
                    line["layer"],
                    line["value"],
                    color=CYCLE[place],
                    marker=MARKERS[place],
                    linestyle=DASHES[place],
                    label=LABELS[name],
                )
                ends = [line[end].to_numpy(float) for end in ("low", "high")]
                axis.fill_between(
                    line["layer"].to_numpy(float), *ends, color=CYCLE[place], alpha=0.2, linewidth=0
                )
            scale_axis(axis.yaxis, rows["value"].to_numpy(float))
            axis.set_title(PANELS[panel][0], loc="left")
            block_axis(axis, PANELS[panel][1])
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if stacked else 4)
        return figure


def describe_placement(table: pd.DataFrame) -> str:
    """What the figure shows, for a reader who cannot see it."""
    said = []
    for name in (name for name in LABELS if name in set(table["placement"])):
        words = []
        for panel, what in (("gradient", "gradient"), ("angle", "angle"), ("loss", "loss")):
            rows = table.loc[(table["placement"] == name) & (table["panel"] == panel)].sort_values("layer")
            if len(rows):
                first, last = float(rows["value"].iloc[0]), float(rows["value"].iloc[-1])
                steps = "removed blocks" if panel == "loss" else "depth"
                ends = (int(rows["layer"].iloc[0]), int(rows["layer"].iloc[-1]))
                words.append(
                    f"{what} {number(first)} at {steps} {ends[0]} and {number(last)} at {steps} {ends[1]}"
                )
        said.append(f"{LABELS[name]}: {', '.join(words)}.")
    return " ".join(said)


def run_table(run: Run) -> pd.DataFrame | None:
    """The figure's numbers from a run's ``decide`` step; None for studies of another kind."""
    for step in run.steps:
        if step.kind == "decide" and {"depth.parquet", "removals.parquet"} <= set(step.files):
            tables = [pd.read_parquet(step.folder / f"{name}.parquet") for name in ("depth", "removals")]
            return placement_table(*tables)
    return None


def _draw(run: Run, width: str) -> Figure:
    table = run_table(run)
    return norm_placement(pd.DataFrame() if table is None else table, width=width)


NORM_PLACEMENT = FigureSpec(
    name="norm-placement",
    title="Where the norm sits",
    caption=(
        "Models trained from scratch on the same tokens that differ only in where their norms sit: the "
        "gradient that reaches each depth, the angle that each block turns the stream by, and the loss as "
        "the deepest blocks go. Lines are means over seeds, bands run from the least to the largest seed."
    ),
    table=run_table,
    draw=_draw,
    describe=describe_placement,
)
