"""Figures of the theorems: random networks against theory, and the list with the mutated steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.report.load import Run
from preln.report.mutant_figures import describe_mutants, details, mutant_chart, mutant_table
from preln.report.spec import FigureSpec
from preln.report.style import (
    CYCLE,
    DASHES,
    INK,
    MARKERS,
    house_style,
    need,
    new_figure,
    plain,
    settle,
)
from preln.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = tuple(zip(MARKERS, (3.0, 4.6, 3.6, 5.2, 3.0, 4.6), strict=True))
"""Hollow and of unequal size, so that points on top of each other show."""
MEASURED = ("panel", "curve", "series", "x", "value", "low", "high")


def panels(run: Run, id: str) -> list[dict[str, Any]]:
    """The panels of a claim's measurement; none where it has not been measured."""
    for claim in run.claims:
        if claim["id"] == id:
            for item in details(claim):
                if item.get("kind") == "measurement" and item["detail"].get("panels"):
                    return list(item["detail"]["panels"])
    return []


def panel_table(run: Run, id: str) -> pd.DataFrame | None:
    """The numbers of a claim's measurement, one row a point: panel, curve, series, x, value, low, high.

    `curve` is `measured` or `theory`; a band of theory has no value.
    """
    rows = []
    for panel in panels(run, id):
        for kind in ("measured", "theory"):
            for series in panel[kind]:
                values = series.get("mean") or series.get("y") or [None] * len(series["x"])
                lows, highs = (series.get(end) or values for end in ("low", "high"))
                for x, value, low, high in zip(series["x"], values, lows, highs, strict=True):
                    rows.append((panel["title"], kind, series["name"], x, value, low, high))
    return pd.DataFrame(rows, columns=list(MEASURED)) if rows else None


def measurement(shown: Sequence[dict[str, Any]], *, width: str = "single") -> Figure:
    """Measured means with their intervals (markers) on the curves and bands of theory.

    Args:
        shown: panels of a measurement, as the ledger holds them.
        width: "single" (panels one under the other) or "double" column (side by side).

    Raises:
        InputError: there is no panel.
    """
    need(len(shown), "panels of a measurement")
    stacked = width == "single"
    longest = max(len(panel["measured"]) for panel in shown)
    with house_style():
        high = 1.75 + 0.13 * longest
        shape = {"nrows": len(shown)} if stacked else {"ncols": len(shown)}
        figure, axes = new_figure(width, high * len(shown) if stacked else 2.1 + 0.26 * longest, **shape)
        for axis, panel in zip(axes.flat, shown, strict=True):
            _panel(axis, panel, columns=2 if stacked or len(shown) < 3 else 1)
        settle(figure)
        return figure


def _panel(axis: Axes, panel: dict[str, Any], *, columns: int) -> None:
    """Draw one panel; its legend below has what was measured on the left, its theory on the right."""
    from matplotlib.transforms import ScaledTranslation

    left, right = [], []
    for series, colour, (marker, size) in zip(panel["measured"], CYCLE, SIZES, strict=False):
        expected = [t for t in panel["theory"] if t.get("of") == series["name"]]
        lines = [_theory(axis, t, colour) for t in expected]
        left.append(_points(axis, series, colour, marker, size))
        right += lines or [axis.plot([], [], linestyle="none", label=" ")[0]]
    loose = [t for t in panel["theory"] if t.get("of") is None]
    right += [_theory(axis, t, INK) for t in loose]
    left += [axis.plot([], [], linestyle="none", label=" ")[0]] * (len(right) - len(left))
    _depth_axis(axis, panel)
    axis.set_yscale(panel.get("yscale", "linear"))
    _value_axis(axis)
    axis.set_title(panel["title"], loc="left")
    axis.set_xlabel(panel["xlabel"])
    axis.set_ylabel(panel["ylabel"])
    pairs = [h for pair in zip(left, right, strict=True) for h in pair if h.get_label() != " "]
    below = ScaledTranslation(-16 / 72, -28 / 72, axis.figure.dpi_scale_trans)  # clear of the axis label
    axis.legend(
        handles=[*left, *right] if columns == 2 else pairs,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axis.transAxes + below,
        borderaxespad=0,
        ncols=columns,
        fontsize=6.3,
        columnspacing=1.0,
        handletextpad=0.5,
        handlelength=1.8,
    )


def _points(axis: Axes, series: dict[str, Any], colour: str, marker: str, size: float) -> Any:
    below = [mean - low for mean, low in zip(series["mean"], series["low"], strict=True)]
    above = [high - mean for mean, high in zip(series["mean"], series["high"], strict=True)]
    return axis.errorbar(
        series["x"],
        series["mean"],
        yerr=[below, above],
        color=colour,
        marker=marker,
        markersize=size,
        markerfacecolor="none",
        markeredgewidth=0.9,
        linestyle="none",
        elinewidth=0.8,
        label=series["name"],
        zorder=3,
    )


def _theory(axis: Axes, series: dict[str, Any], colour: str) -> Any:
    label = series["name"]
    if "y" in series:
        return axis.plot(
            series["x"], series["y"], color=colour, linewidth=1.0, linestyle=DASHES[1], label=label
        )[0]
    return axis.fill_between(
        series["x"], series["low"], series["high"], color=colour, alpha=0.2, linewidth=0, label=label
    )


def _depth_axis(axis: Axes, panel: dict[str, Any]) -> None:
    """Logarithmic beside a logarithmic scale, where depths are spread over more than a decade."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    depths = sorted({x for series in panel["measured"] for x in series["x"]})
    if depths and depths[0] > 0 and depths[-1] / depths[0] > 10 and panel.get("yscale") == "log":
        axis.set_xscale("log")
        powers = [2**k for k in range(20) if depths[0] <= 2**k <= depths[-1]]
        axis.set_xticks(powers if powers and powers[0] < 1.4 * depths[0] else [depths[0], *powers])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _value_axis(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 60 else (1,), numticks=8))
        axis.yaxis.set_minor_formatter(NullFormatter())
        if high / low > 1000:
            axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _describe(table: pd.DataFrame) -> str:
    """Where each measured curve starts and ends."""
    parts = []
    measured = table.loc[table["curve"] == "measured"]
    for (panel, series), rows in measured.groupby(["panel", "series"], sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        parts.append(
            f"{panel}, {series}: {number(first['value'])} at depth {number(first['x'])}, "
            f"{number(last['value'])} at depth {number(last['x'])}"
        )
    return "; ".join(parts) + "."


def _measurement_spec(id: str, name: str, title: str, caption: str) -> FigureSpec:
    return FigureSpec(
        name,
        title,
        caption,
        lambda run: panel_table(run, id),
        lambda run, width: measurement(panels(run, id), width=width),
        _describe,
    )


INTERVALS = (
    "Markers: means over random networks with 99 % intervals that hold for all points at once. Dashed lines "
    "and bands of the same colour: theory. Lines must lie in the intervals, and intervals in the bands."
)
THEORY_FIGURES = (
    _measurement_spec(
        "STK-INIT",
        "theory-initialisation",
        "Pre-LN and Post-LN at initialisation",
        f"{INTERVALS} Gradients are shown as the inverse root of the mean inverse square, whose mean theory "
        "knows; per unit of the output's gradient c and of the input h of the last W₂.",
    ),
    _measurement_spec(
        "STK-GROWTH",
        "theory-growth",
        "Growth with depth: uncorrelated and aligned branches",
        f"{INTERVALS} The product ∏(1 + a/s[k]) bounds σ(∏ J[k]), the Jacobian from block l to L; "
        "c = 2a/√v, v the mean square of what a branch adds; p = a/m, m the rms of the aligned ones. Bands "
        "reach from theory's lower to its upper end. Means of σ and of the product are geometric.",
    ),
    FigureSpec(
        "theory-mutants",
        "Mutated steps that the proofs reject",
        "Each number counts false variants of a theorem's steps, by what was done to them; all went through "
        "the same checks as the true steps. Blue: all rejected. Orange-red, rejected/all: some survived, and "
        "the check would not have noticed the mistake.",
        mutant_table,
        lambda run, width: mutant_chart(mutant_table(run), width=width),
        describe_mutants,
    ),
)
