"""Heat map of the angular distances across runs of blocks, with the blocks that a study removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.report.load import Run
from preln.report.spec import FigureSpec
from preln.report.style import INK, MARKERS, PAPER, block_axis, house_style, need, new_figure, short
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURE = "angular_distance_last_token"
"""What UIDL takes (Gromov et al. 2024); the mean over all tokens where it is not stored."""


def distance_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """Angle over pi between ``x[start]`` and ``x[start + size]``: start, size, distance, least.

    ``least`` marks, of all runs of one size, the one with the least distance (the first of equals).
    """
    column = MEASURE if MEASURE in pairs.columns else "angular_distance"
    table = pairs.loc[:, ["start", "size", column]].rename(columns={column: "distance"})
    table = table.sort_values(["size", "start"], ignore_index=True)
    known: pd.DataFrame = table.loc[table["distance"].notna()]
    firsts = known.groupby("size")["distance"].idxmin() if len(known) else []
    return table.assign(least=table.index.isin(list(firsts)))


def windows(run: Run) -> pd.DataFrame:
    """The removed sets that are one run of blocks, as the heat map marks them: name, start, size."""
    rows: list[dict[str, Any]] = []
    for prune in run.prunes:
        drop = sorted(int(block) for block in prune["drop"])
        if drop and drop[-1] - drop[0] + 1 == len(drop):
            rows.append({"name": str(prune["metric"]), "start": drop[0], "size": len(drop)})
    return pd.DataFrame(rows, columns=["name", "start", "size"])


def pair_distances(
    pairs: pd.DataFrame, chosen: pd.DataFrame | None = None, *, width: str = "single"
) -> Figure:
    """Heat map of the distance across every run of blocks; dots mark the least of each size.

    Args:
        pairs: start, size, angular_distance and maybe angular_distance_last_token.
        chosen: removed runs of blocks to mark: name, start, size.
        width: "single" or "double" column.

    Raises:
        InputError: the table has no rows.
    """
    table = distance_table(pairs)
    need(len(table), "angular distances")
    marked = windows_by_place(chosen)
    grid = table.pivot(index="size", columns="start", values="distance")
    starts, sizes = grid.columns.to_numpy(), grid.index.to_numpy()
    with house_style():
        figure, axes = new_figure(width, 3.1 if width == "single" else 3.6)
        axis = axes[0, 0]
        mesh = axis.pcolormesh(
            np.append(starts - 0.5, starts[-1] + 0.5),
            np.append(sizes - 0.5, sizes[-1] + 0.5),
            np.ma.masked_invalid(grid.to_numpy(float)),
            cmap="cividis",
            edgecolors="face",
            linewidth=0.2,
        )
        least: pd.DataFrame = table.loc[table["least"]]
        look = {"linestyle": "none", "color": INK, "markeredgecolor": PAPER}
        axis.plot(least["start"], least["size"], **look, marker="o", markersize=3, markeredgewidth=0.4,
                  label="least of its size")  # fmt: skip
        look |= {"markeredgecolor": INK, "color": "#ffffff", "markersize": 6, "markeredgewidth": 1.0}
        for place, (names, spots) in enumerate(marked.items(), 1):
            label = f"removed by {short(names, 40)}"
            axis.plot(*zip(*spots, strict=True), **look, marker=MARKERS[place % len(MARKERS)], label=label)
        axis.set_ylabel("blocks spanned")
        block_axis(axis, "first block")
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axis, pad=0.02)
        bar.set_label("angle over π")
        bar.outline.set_visible(False)
        figure.legend(loc="outside lower center", ncols=1 if width == "single" else 3)
        return figure


def windows_by_place(chosen: pd.DataFrame | None) -> dict[str, list[tuple[int, int]]]:
    """(start, size) of removed runs of blocks by criterion; those that several removed stand under all."""
    if chosen is None or not len(chosen):
        return {}
    found: dict[str, list[tuple[int, int]]] = {}
    groups: Any = chosen.groupby(["start", "size"], sort=True)  # keys are typed as Hashable only
    for (start, size), own in groups:
        found.setdefault(", ".join(dict.fromkeys(own["name"])), []).append((int(start), int(size)))
    return found


def _table(run: Run) -> pd.DataFrame | None:
    return None if run.pairs is None or not len(run.pairs) else distance_table(run.pairs)


def _draw(run: Run, width: str) -> Figure:
    assert run.pairs is not None  # drawn only where the table was found
    return pair_distances(run.pairs, windows(run), width=width)


def _describe(table: pd.DataFrame) -> str:
    least: pd.DataFrame = table.loc[table["least"]]
    longest = max(int(size) for size in table["size"])
    wanted = sorted({1, longest // 4, longest // 2} & set(least["size"]))
    parts = []
    for row in least.loc[least["size"].isin(wanted)].to_dict("records"):
        span = f"{row['size']} block{'s' if row['size'] > 1 else ''}"
        parts.append(f"of runs of {span} the least distance is {number(row['distance'])}, "
                     f"from block {row['start']}")  # fmt: skip
    return f"{len(table)} runs of blocks; " + "; ".join(parts) + "."


DISTANCE_FIGURES = (
    FigureSpec(
        "pair-distances",
        "Angular distance across runs of blocks",
        "Each cell is the angle, over π, between what enters a block and what leaves the last of the blocks "
        "spanned: a dark cell is a run that turns the stream little. Dots mark the least of each size; a "
        "removed set is marked where it is one run of blocks.",
        _table,
        _draw,
        _describe,
    ),
)
