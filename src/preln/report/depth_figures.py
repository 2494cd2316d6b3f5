"""Figures of what the probe measured by depth: the residual stream, the gradients, the norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from preln.report.style import (
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    block_axis,
    house_style,
    need,
    new_figure,
    scale_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTH_MEASURES = {
    "residual_rms": "RMS of the residual stream x[l]",
    "grad_hidden": "gradient |∂L/∂x[l]|",
    "grad_param": "gradient |∂L/∂θ[l]|",
}
NORM_SITES = {"attention": "before attention", "mlp": "before the MLP", "final_norm": "final norm"}


def select(layers: pd.DataFrame, measures: tuple[str, ...], sites: tuple[str, ...]) -> pd.DataFrame:
    """Rows of the given measures and sites, with one statistic each: the mean where there is one.

    Returns:
        Columns measure, site, layer, statistic, value, low, high; sorted; possibly without rows.
    """
    wanted = layers["measure"].isin(measures) & layers["site"].isin(sites)
    rows: pd.DataFrame = layers.loc[wanted].copy()
    for column in ("low", "high"):
        if column not in rows:
            rows[column] = math.nan
    # "mean" before all others; otherwise the first by name, so that the choice never depends on row order
    rows["_order"] = [(0, "") if name == "mean" else (1, str(name)) for name in rows["statistic"]]
    first = rows.groupby(["measure", "site"])["_order"].transform("min") if len(rows) else rows["_order"]
    rows = rows.loc[rows["_order"] == first]
    columns = ["measure", "site", "layer", "statistic", "value", "low", "high"]
    return rows.sort_values(["measure", "site", "layer"], ignore_index=True).loc[:, columns]


def depth_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Residual RMS and both gradient norms by block."""
    return select(layers, tuple(DEPTH_MEASURES), ("block",))


def depth_profile(layers: pd.DataFrame, *, width: str = "single") -> Figure:
    """Residual growth and gradients by depth, each with its interval, on log axes.

    Args:
        layers: measures by layer, at least `residual_rms`, `grad_hidden` or `grad_param` at the site `block`.
        width: "single" or "double" column.

    Raises:
        InputError: none of the three measures is there.
    """
    table = depth_table(layers)
    present = [name for name in DEPTH_MEASURES if (table.loc[:, "measure"] == name).any()]
    need(present, "residual_rms, grad_hidden or grad_param at the site 'block'")
    with house_style():
        stacked = width == "single"
        shape = {"nrows": len(present), "sharex": True} if stacked else {"ncols": len(present)}
        figure, axes = new_figure(width, 1.35 * len(present) + 0.35 if stacked else 2.3, **shape)
        for axis, name, colour in zip(axes.flat, present, CYCLE, strict=False):
            rows = table.loc[table["measure"] == name]
            band(axis, rows, color=colour, marker="o")
            scale_axis(axis.yaxis, rows["value"].to_numpy(float))
            axis.set_title(DEPTH_MEASURES[name], loc="left")
            block_axis(axis, "" if stacked and name != present[-1] else "depth l")
        return figure


def sigma_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Norms' sigma and its upper bound by block and site."""
    return select(layers, ("norm_sigma", "norm_sigma_bound"), tuple(NORM_SITES))


def norm_sigma(layers: pd.DataFrame, *, width: str = "single") -> Figure:
    """Largest singular value of each norm's Jacobian, with the learned gain, and its closed-form bound.

    Args:
        layers: measures by layer, with `norm_sigma` and maybe `norm_sigma_bound`.
        width: "single" or "double" column.

    Raises:
        InputError: no `norm_sigma` in the table.
    """
    table = sigma_table(layers)
    need((table["measure"] == "norm_sigma").any(), "norm_sigma")
    with house_style():
        figure, axes = new_figure(width, 2.9)
        axis = axes[0, 0]
        axis.axhline(1.0, color=INK, linewidth=0.7, linestyle=(0, (2, 2)), label="1")
        for (site, label), colour, marker in zip(NORM_SITES.items(), CYCLE, MARKERS, strict=False):
            exact = table.loc[(table["site"] == site) & (table["measure"] == "norm_sigma")]
            bound = table.loc[(table["site"] == site) & (table["measure"] == "norm_sigma_bound")]
            if len(exact):
                band(axis, exact, color=colour, marker=marker, label=f"σ, {label}")
            if len(bound) == 1:
                axis.plot(
                    bound["layer"], bound["value"], color=colour, marker="_", markersize=8, linestyle="none"
                )
            elif len(bound):
                axis.plot(
                    bound["layer"],
                    bound["value"],
                    color=colour,
                    linewidth=0.8,
                    linestyle=DASHES[1],
                    label=f"bound, {label}",
                )
        scale_axis(axis.yaxis, [*table["value"], 1.0])
        axis.set_ylabel("σ of the norm's Jacobian")
        block_axis(axis)
        figure.legend(loc="outside lower center", ncols=2 if width == "single" else 4, columnspacing=1.2)
        return figure


def band(axis: Axes, rows: pd.DataFrame, *, color: str, marker: str, label: str | None = None) -> None:
    """A line of values by layer, with its interval as a band where there is one."""
    axis.plot(rows["layer"], rows["value"], color=color, marker=marker, label=label)
    if rows[["low", "high"]].notna().to_numpy().all(axis=1).any() and len(rows) > 1:
        axis.fill_between(
            rows["layer"].to_numpy(float),
            rows["low"].to_numpy(float),
            rows["high"].to_numpy(float),
            color=color,
            alpha=0.25,
            linewidth=0,
        )
