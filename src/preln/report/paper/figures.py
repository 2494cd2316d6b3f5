"""Figures of the write-up: each is a function of the committed results alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from preln.report.collapse_figures import collapse_curves, collapse_table
from preln.report.depth_figures import depth_profile, norm_sigma
from preln.report.jacobian_figures import jacobian_bounds
from preln.report.paper.results import PLACEMENT, WINDOWS, Results
from preln.report.placement_figures import norm_placement, run_table
from preln.report.pruning_figures import damage_table
from preln.report.selection import selection_damage
from preln.report.style import INK, PALETTE, house_style, need, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def _held(table: pd.DataFrame | None) -> pd.DataFrame:
    assert table is not None  # the committed study holds every table
    return table


def damage_ranks(table: pd.DataFrame, *, width: str = "single") -> Figure:
    """Blocks by the rank of what is predicted and of what is measured: points cannot pile up.

    Args:
        table: layer, score, delta; see :func:`preln.report.pruning_figures.damage_table`.
        width: "single" or "double" column.

    Raises:
        InputError: The table is empty.
    """
    need(len(table), "block with a score and a measured damage")
    ranks = table[["score", "delta"]].rank(method="first")
    with house_style():
        figure, axes = new_figure(width, 2.9)
        axis = axes.flat[0]
        last = len(table) + 1
        axis.plot([0, last], [0, last], color=INK, linewidth=0.7, linestyle=":")
        for layer, x, y in zip(table["layer"], ranks["score"], ranks["delta"], strict=True):
            axis.text(x, y, str(layer), ha="center", va="center", fontsize=7, color=PALETTE["blue"])
        axis.set(xlim=(0, last), ylim=(0, last))
        axis.set_xlabel("rank by first-order damage")
        axis.set_ylabel("rank by measured rise of the loss")
        return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "depth-profile": lambda r: depth_profile(r.layers, width="double"),
    "norm-sigma": lambda r: norm_sigma(r.layers, width="single"),
    "jacobian-bounds": lambda r: jacobian_bounds(r.layers, width="double"),
    "damage-ranks": lambda r: damage_ranks(damage_table(_held(r.study.scores), _held(r.study.damage))),
    "selection-damage": lambda r: selection_damage(r.damage, width="double"),
    "collapse-curves": lambda r: collapse_curves(collapse_table(r.others[WINDOWS]), width="double"),
    "norm-placement": lambda r: norm_placement(_held(run_table(r.others[PLACEMENT])), width="double"),
}
