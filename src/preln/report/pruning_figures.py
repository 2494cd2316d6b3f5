"""Figures of the choice of blocks: predicted against measured damage, and the order of removal by metric."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from preln.report.style import (
    CYCLE,
    MARKERS,
    PAPER,
    block_axis,
    house_style,
    need,
    new_figure,
    scale_axis,
    short,
)
from preln.report.summary import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def damage_table(
    scores: pd.DataFrame, damage: pd.DataFrame, metric: str = "first_order_damage"
) -> pd.DataFrame:
    """A metric's score beside the measured damage of removing each block: layer, score, delta, low, high."""
    chosen = scores.loc[scores["metric"] == metric, ["layer", "score"]]
    measured = damage.reindex(columns=["layer", "delta", "low", "high"])
    return chosen.merge(measured, on="layer").sort_values("layer", ignore_index=True)


def predicted_damage(
    scores: pd.DataFrame, damage: pd.DataFrame, *, metric: str = "first_order_damage", width: str = "single"
) -> Figure:
    """A score against the measured damage, one point a block, with the rank correlation.

    Args:
        scores: metric, layer, score.
        damage: layer, delta and maybe low, high.
        metric: whose scores to show.
        width: "single" or "double" column.

    Raises:
        InputError: no block has both a score under this metric and a measured damage.
    """
    table = damage_table(scores, damage, metric)
    need(len(table), f"scores of {metric!r} for blocks with measured damage")
    with house_style():
        figure, axes = new_figure(width, 2.9)
        axis = axes[0, 0]
        depth = len(table)
        thirds = np.minimum(3 * np.arange(depth) // max(depth, 1), 2)
        for third, name in enumerate(("first third", "middle third", "last third")):
            rows: pd.DataFrame = table.loc[thirds == third]
            if not len(rows):
                continue
            label = f"{name}: {rows['layer'].min()}–{rows['layer'].max()}"
            errors = np.abs(rows[["low", "high"]].to_numpy(float) - rows[["delta"]].to_numpy(float)).T
            axis.errorbar(
                rows["score"],
                rows["delta"],
                yerr=errors,
                color=CYCLE[third],
                marker=MARKERS[third],
                markersize=4,
                linestyle="none",
                elinewidth=0.6,
                label=label,
            )
        scale_axis(axis.xaxis, table["score"].to_numpy(float))
        scale_axis(axis.yaxis, table["delta"].to_numpy(float))
        axis.set_xlabel(f"predicted: {short(metric)}")
        axis.set_ylabel("measured rise of the loss (nats)")
        rho = spearman(table.loc[:, "score"], table.loc[:, "delta"])
        text = "undefined" if math.isnan(rho) else f"{rho:.2f}".replace("-", "−")
        axis.set_title(f"rank correlation {text} over {depth} blocks", loc="left")
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.2, columnspacing=1.0)
        _label_points(figure, axis, table)
        return figure


def rank_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Order of removal under each metric: metric, layer, score, rank (0 is removed first)."""
    columns = ["metric", "layer", "score", "rank"]
    return scores.loc[:, columns].sort_values(["metric", "layer"], ignore_index=True)


def removal_order(
    scores: pd.DataFrame, chosen: dict[str, list[int]] | None = None, *, width: str = "single"
) -> Figure:
    """Heat map of the order in which each metric removes the blocks; crosses mark those that were removed.

    Args:
        scores: metric, layer, rank.
        chosen: the blocks removed in this run, by metric.
        width: "single" or "double" column.

    Raises:
        InputError: the table has no rows.
    """
    need(len(scores), "scores")
    grid = scores.pivot_table(index="metric", columns="layer", values="rank", aggfunc="first").sort_index()
    with house_style():
        figure, axes = new_figure(width, 0.24 * len(grid) + (1.15 if width == "single" else 1.0))
        axis = axes[0, 0]
        layers = grid.columns.to_numpy()
        edges = np.append(layers - 0.5, layers[-1] + 0.5)
        mesh = axis.pcolormesh(
            edges,
            np.arange(len(grid) + 1) - 0.5,
            np.ma.masked_invalid(grid.to_numpy(float)),
            cmap="cividis_r",
            edgecolors=PAPER,
            linewidth=0.5,
        )
        size = 3.0 if width == "single" else 4.5
        for row, metric in enumerate(grid.index):
            blocks = [block for block in (chosen or {}).get(metric, []) if block in grid.columns]
            axis.plot(
                blocks, [row] * len(blocks), marker="x", linestyle="none", color="#000000", markersize=size
            )
        axis.set_yticks(range(len(grid)), [short(str(name)) for name in grid.index])
        axis.set_ylim(len(grid) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.spines[:].set_visible(False)
        block_axis(axis, "block (× removed in this run)" if chosen else "block")
        bar = figure.colorbar(mesh, ax=axis, orientation="horizontal", shrink=0.6, aspect=30, pad=0.02)
        last = int(np.nanmax(grid.to_numpy(float)))
        bar.set_ticks([0, last], labels=["removed first", "removed last"])
        bar.outline.set_visible(False)
        return figure


def _label_points(figure: Figure, axis: Axes, table: pd.DataFrame) -> None:
    """Write block numbers beside the points, those furthest off in rank first, wherever there is room."""
    ranks_apart = (table["score"].rank() - table["delta"].rank()).abs()
    order = table.assign(apart=ranks_apart).sort_values(
        ["apart", "delta", "layer"], ascending=[False, False, True]
    )
    # Positions in pixels are final only once the layout is.
    figure.draw_without_rendering()
    points = axis.transData.transform(table[["score", "delta"]].to_numpy(float))
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    frame = axis.get_window_extent()
    for _, row in order.iterrows():
        x, y = axis.transData.transform((row["score"], row["delta"]))
        text = f"{row['layer']:.0f}"
        wide, high = 5.5 * len(text), 9
        for dx, dy in ((5, 3), (5, -11), (-5 - wide, 3), (-5 - wide, -11)):
            box = (x + dx, y + dy, x + dx + wide, y + dy + high)
            inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                # offsets are in points, boxes in pixels
                scale = 72 / figure.dpi
                axis.annotate(
                    text,
                    (row["score"], row["delta"]),
                    xytext=(dx * scale, dy * scale),
                    textcoords="offset points",
                    fontsize=6,
                    annotation_clip=False,
                )
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
