"""The gallery: which figures a run gives, with the words and the numbers that go with each.

The drawing functions are here under one roof for notebooks::

    from preln.report import figures
    figures.depth_profile(preln.probe(model, batch), width="double")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from preln.report.collapse_figures import COLLAPSE, collapse_curves
from preln.report.depth_figures import depth_profile, depth_table, norm_sigma, sigma_table
from preln.report.distance_figures import DISTANCE_FIGURES, pair_distances
from preln.report.healing_exhibits import HEALING_FIGURES
from preln.report.healing_figures import healing_curves, outcome_chart
from preln.report.healing_means import healing_panels
from preln.report.jacobian_figures import JACOBIAN_FIGURES, jacobian_bounds, logit_lens
from preln.report.load import Run
from preln.report.placement_figures import NORM_PLACEMENT
from preln.report.pruning_figures import damage_table, predicted_damage, rank_table, removal_order
from preln.report.spec import FigureSpec
from preln.report.style import WIDTHS
from preln.report.summary import spearman
from preln.report.tables import number
from preln.report.theory_figures import THEORY_FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FIGURES",
    "Exhibit",
    "FigureSpec",
    "collapse_curves",
    "depth_profile",
    "exhibits",
    "healing_curves",
    "healing_panels",
    "jacobian_bounds",
    "logit_lens",
    "norm_sigma",
    "outcome_chart",
    "pair_distances",
    "predicted_damage",
    "removal_order",
]


@dataclass(frozen=True)
class Exhibit:
    """A figure that a run does give: its spec, numbers, alternative text, and drawing at each width."""

    spec: FigureSpec
    table: pd.DataFrame
    alt: str
    drawings: dict[str, Figure]


def exhibits(run: Run) -> list[Exhibit]:
    """The figures for which the run holds the numbers, in the order of the page."""
    found = []
    for spec in FIGURES:
        table = spec.table(run)
        if table is not None and len(table):
            drawings = {width: spec.draw(run, width) for width in WIDTHS}
            found.append(Exhibit(spec, table, f"{spec.title}. {spec.describe(table)}", drawings))
    return found


def _held(table: pd.DataFrame | None) -> pd.DataFrame:
    """A table that the run holds: a figure is drawn only where its spec found one."""
    assert table is not None
    return table


def _sigma(run: Run) -> pd.DataFrame | None:
    table = None if run.layers is None else sigma_table(run.layers)
    # a bound without the exact value is no figure
    return table if table is not None and (table.loc[:, "measure"] == "norm_sigma").any() else None


def _predicted(run: Run) -> pd.DataFrame | None:
    return None if run.scores is None or run.damage is None else damage_table(run.scores, run.damage)


def _chosen(run: Run) -> dict[str, list[int]]:
    """The largest set of blocks removed under each metric."""
    chosen: dict[str, list[int]] = {}
    for prune in run.prunes:
        metric, drop = str(prune["metric"]), [int(block) for block in prune["drop"]]
        if len(drop) > len(chosen.get(metric, [])):
            chosen[metric] = drop
    return chosen


def _describe_depth(table: pd.DataFrame) -> str:
    parts = []
    for name, rows in table.groupby("measure", sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        parts.append(
            f"{name} goes from {number(first['value'])} at l = {first['layer']} "
            f"to {number(last['value'])} at l = {last['layer']}"
        )
    return "; ".join(parts) + "."


def _describe_sigma(table: pd.DataFrame) -> str:
    exact: pd.DataFrame = table.loc[table["measure"] == "norm_sigma"]
    sigma: pd.Series = exact.loc[:, "value"]
    top = exact.loc[sigma.idxmax()] if sigma.notna().any() else None
    below = int((sigma < 1).sum())
    peak = (
        ""
        if top is None
        else f" the largest, {number(top['value'])}, is at block {top['layer']} ({top['site']})."
    )
    return f"Sigma is below 1 at {below} of {len(exact)} norms;{peak}"


def _describe_predicted(table: pd.DataFrame) -> str:
    delta: pd.Series = table.loc[:, "delta"]
    rho = spearman(table.loc[:, "score"], delta)
    worst = table.loc[delta.idxmax()] if delta.notna().any() else None
    tail = (
        ""
        if worst is None
        else f"; removing block {worst['layer']:.0f} costs most, {number(worst['delta'])} nats"
    )
    text = "undefined" if math.isnan(rho) else f"{rho:.2f}"
    return f"Spearman rank correlation {text} over {len(table)} blocks{tail}."


def _describe_order(table: pd.DataFrame) -> str:
    firsts: pd.DataFrame = table.loc[table["rank"] == 0]
    pairs = zip(firsts["metric"], firsts["layer"], strict=True)
    return "Removed first: " + "; ".join(f"{metric}: block {layer}" for metric, layer in pairs) + "."


FIGURES = (
    FigureSpec(
        "depth-profile",
        "Residual growth and gradient by depth",
        "x[l] is what enters block l, and the last x is the last block's output before the "
        "final norm. Bands are 95 % intervals where the probe gives them.",
        lambda run: None if run.layers is None else depth_table(run.layers),
        lambda run, width: depth_profile(_held(run.layers), width=width),
        _describe_depth,
    ),
    FigureSpec(
        "norm-sigma",
        "Norm sigma with its bound, by depth",
        "Largest singular value of each norm's Jacobian with its learned gain (solid) under its bound "
        "(dashed); below the dotted line at 1 the norm shrinks what passes back through it.",
        _sigma,
        lambda run, width: norm_sigma(_held(run.layers), width=width),
        _describe_sigma,
    ),
    FigureSpec(
        "predicted-damage",
        "Predicted against measured damage",
        "One point a block: what one backward pass of the whole model predicts, against the rise of the "
        "held-out loss when that block alone is removed. Numbers are blocks.",
        _predicted,
        lambda run, width: predicted_damage(_held(run.scores), _held(run.damage), width=width),
        _describe_predicted,
    ),
    FigureSpec(
        "removal-order",
        "Order of removal by metric",
        "Each row is a metric, each column a block; bright blocks go first. Crosses mark the blocks "
        "removed in this run.",
        lambda run: None if run.scores is None else rank_table(run.scores),
        lambda run, width: removal_order(_held(run.scores), _chosen(run), width=width),
        _describe_order,
    ),
    *DISTANCE_FIGURES,
    COLLAPSE,
    *HEALING_FIGURES,
    *JACOBIAN_FIGURES,
    *THEORY_FIGURES,
    NORM_PLACEMENT,
)
