"""Figures of block and stack Jacobians under the theory's bounds, and of the logit lens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from preln.report.depth_figures import band, select
from preln.report.load import Run
from preln.report.spec import FigureSpec
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
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# measure -> legend, and whether it was measured (solid) or is a bound (dashed)
BLOCK_CURVES = {
    "block_sigma": ("σ(J)", True),
    "update_sigma": ("σ(J − I)", True),
    "block_sigma_bound": ("bound on σ(J)", False),
}
STACK_CURVES = {
    "stack_sigma": ("σ of x[l] → x[L]", True),
    "stack_sigma_product": ("product of measured σ(J)", False),
    "stack_sigma_bound": ("product of the bounds", False),
}
LENS = {
    "lens_loss": "loss (nats) if the head came at l",
    "lens_agreement": "same first choice (share)",
}


def jacobian_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Sigma of blocks, updates and stacks, with their bounds, by block."""
    return select(layers, (*BLOCK_CURVES, *STACK_CURVES), ("block",))


def jacobian_bounds(layers: pd.DataFrame, *, width: str = "single") -> Figure:
    """Sigma of every block and of the stack from every block to the end, beside the theory's bounds.

    Args:
        layers: measures by layer, with `block_sigma`, `update_sigma` or `stack_sigma`.
        width: "single" or "double" column.

    Raises:
        InputError: none of them is in the table.
    """
    table = jacobian_table(layers)
    held = set(table["measure"])
    panels = [curves for curves in (BLOCK_CURVES, STACK_CURVES) if held & set(curves)]
    need(panels, "block_sigma, update_sigma or stack_sigma")
    with house_style():
        stacked = width == "single"
        shape = {"nrows": len(panels)} if stacked else {"ncols": len(panels)}
        figure, axes = new_figure(width, 2.6 * len(panels) if stacked else 2.9, **shape)
        for axis, curves in zip(axes.flat, panels, strict=True):
            _draw(axis, table, curves)
            block_axis(axis, "block" if curves is BLOCK_CURVES else "from block l to the end")
        return figure


def _draw(axis: Axes, table: pd.DataFrame, curves: dict[str, tuple[str, bool]]) -> None:
    shown, first = [], True
    for (name, (label, measured)), colour, marker in zip(curves.items(), CYCLE, MARKERS, strict=False):
        rows = table.loc[table["measure"] == name]
        if rows.empty:
            continue
        shown.extend(rows["value"])
        if measured:
            band(axis, rows, color=colour, marker=marker, label=label)
            if not first:  # curves that nearly agree: the later one's marks are open, so that both are seen
                axis.get_lines()[-1].set(markerfacecolor="none", linestyle="none", markersize=7)
            first = False
        else:
            axis.plot(rows["layer"], rows["value"], color=colour, linestyle=DASHES[1], label=label)
    axis.axhline(1.0, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
    scale_axis(axis.yaxis, [*shown, 1.0])
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)  # above: no curve runs under it


def lens_table(layers: pd.DataFrame) -> pd.DataFrame:
    """Loss and agreement of the model cut off at every depth."""
    return select(layers, tuple(LENS), ("block",))


def logit_lens(layers: pd.DataFrame, *, width: str = "single") -> Figure:
    """What final norm and head make of every x[l]: reverse-order pruning at every depth.

    Args:
        layers: measures by layer, with `lens_loss` and maybe `lens_agreement`.
        width: "single" or "double" column.

    Raises:
        InputError: no `lens_loss` in the table.
    """
    table = lens_table(layers)
    present = [name for name in LENS if name in set(table["measure"])]
    need("lens_loss" in present, "lens_loss")
    with house_style():
        stacked = width == "single"
        shape = {"nrows": len(present), "sharex": True} if stacked else {"ncols": len(present)}
        figure, axes = new_figure(width, 1.7 * len(present) if stacked else 2.3, **shape)
        for axis, name, colour, marker in zip(axes.flat, present, CYCLE, MARKERS, strict=False):
            rows = table.loc[table["measure"] == name]
            band(axis, rows, color=colour, marker=marker)
            scale_axis(axis.yaxis, rows["value"].to_numpy(float))
            axis.set_title(LENS[name], loc="left")
            block_axis(axis, "" if stacked and name != present[-1] else "depth l")
        return figure


def _describe_jacobians(table: pd.DataFrame) -> str:
    parts = []
    for name, (label, measured) in (BLOCK_CURVES | STACK_CURVES).items():
        rows = table.loc[table["measure"] == name]
        if not rows.empty and measured:
            low, high = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
            parts.append(
                f"{label} lies between {number(low['value'])} (l = {low['layer']}) and "
                f"{number(high['value'])} (l = {high['layer']})"
            )
    return "; ".join(parts) + "."


def _describe_lens(table: pd.DataFrame) -> str:
    rows = table.loc[table["measure"] == "lens_loss"].sort_values("layer")
    first, last = rows.iloc[0], rows.iloc[-1]
    return (
        f"The loss goes from {number(first['value'])} at l = {first['layer']} to {number(last['value'])} "
        f"at l = {last['layer']}."
    )


def _if_any(table: pd.DataFrame | None, measures: tuple[str, ...]) -> pd.DataFrame | None:
    return table if table is not None and set(table["measure"]) & set(measures) else None


def _held(run: Run) -> pd.DataFrame:
    """The layers of a run: a figure is drawn only where its spec found some."""
    assert run.layers is not None
    return run.layers


JACOBIAN_FIGURES = (
    FigureSpec(
        "jacobian-bounds",
        "Block and stack Jacobians under their bounds",
        "Solid: measured on whole sequences, with 95 % intervals. Dashed: what the theory allows, from the "
        "measured norms of branches and norm layers; the product of measured σ(J) tells how much of the "
        "distance is due to multiplying. Dotted: 1.",
        lambda run: _if_any(
            None if run.layers is None else jacobian_table(run.layers),
            ("block_sigma", "update_sigma", "stack_sigma"),
        ),
        lambda run, width: jacobian_bounds(_held(run), width=width),
        _describe_jacobians,
    ),
    FigureSpec(
        "logit-lens",
        "Logit lens: the model cut off at every depth",
        "Final norm and head applied to x[l], which is the model without blocks l and later: reverse-order "
        "pruning at every depth, before any healing.",
        lambda run: _if_any(None if run.layers is None else lens_table(run.layers), ("lens_loss",)),
        lambda run, width: logit_lens(_held(run), width=width),
        _describe_lens,
    ),
)
