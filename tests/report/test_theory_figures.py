"""The figures of the theorems plot what the ledger holds, and never hide a survivor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from preln.base.errors import InputError
from preln.report.figures import FIGURES, exhibits
from preln.report.load import Run
from preln.report.mutant_figures import NONE, columns, describe_mutants, mutant_chart, mutant_table
from preln.report.style import PALETTE, WIDTHS, house_style, inline_svg, render
from preln.report.theory_figures import THEORY_FIGURES, measurement, panel_table, panels

X = [1, 2, 4, 8, 16]
PANEL: dict[str, Any] = {
    "title": "Growth",
    "xlabel": "depth L",
    "ylabel": "size",
    "yscale": "log",
    "measured": [
        {
            "name": "one",
            "x": X,
            "mean": [1.0, 2, 4, 8, 16],
            "low": [0.9, 1.9, 3, 7, 15],
            "high": [2.0, 3, 5, 9, 17],
        },
        {
            "name": "two",
            "x": X,
            "mean": [2.0, 2, 2, 2, 2],
            "low": [1.0, 1, 1, 1, 1],
            "high": [3.0, 3, 3, 3, 3],
        },
    ],
    "theory": [
        {"name": "line", "of": "one", "x": X, "y": [1.1, 2.1, 4.1, 8.1, 16.1]},
        {"name": "band", "of": "two", "x": X, "low": [0.5] * 5, "high": [4.0] * 5},
    ],
}


def control(name: str, rejected: Any, mutation: str | None = None) -> dict[str, Any]:
    return {"name": name, "rejected": rejected} | ({} if mutation is None else {"mutation": mutation})


def claim(id: str, *evidence: dict[str, Any], kind: str = "theorem") -> dict[str, Any]:
    return {"id": id, "kind": kind, "status": "proved", "evidence": list(evidence)}


def proof(*controls: dict[str, Any], kind: str = "smt") -> dict[str, Any]:
    return {"kind": kind, "outcome": "pass", "detail": {"negative_controls": list(controls)}}


CLAIMS = (
    claim(
        "RMS-JAC",
        proof(control("a", True, "eps dropped"), control("b", True, "eps dropped"), kind="symbolic"),
        proof(control("c", True), control("d", True, "made up")),
    ),
    claim("LN-JAC", proof(control("loose", False, "bound tightened"), control("e", True, "bound tightened"))),
    claim("STK-GROWTH", {"kind": "measurement", "outcome": "pass", "detail": {"panels": [PANEL, PANEL]}}),
    claim("HYP-SIGMA", kind="hypothesis"),
)


def run_of(*claims: dict[str, Any]) -> Run:
    return Run(Path("."), "run", {}, {}, (), claims=tuple(claims))


def shown_ticks(axis: Any) -> list[Any]:
    """Tick labels within the limits: matplotlib makes some beyond them, which it does not draw."""
    low, high = sorted(axis.get_view_interval())
    return [
        t.label1 if t.label1.get_visible() else t.label2
        for t in axis.get_major_ticks()
        if low <= t.get_loc() <= high
    ]


@pytest.fixture
def run() -> Run:
    return run_of(*CLAIMS)


def test_table_holds_every_point(run: Run) -> None:
    table = panel_table(run, "STK-GROWTH")
    assert table is not None and len(table) == 2 * 4 * len(X)
    one = table[(table["series"] == "one") & (table["panel"] == "Growth")]
    assert list(one["value"])[:5] == PANEL["measured"][0]["mean"]
    band = table[table["series"] == "band"]
    assert band["value"].isna().all() and set(band["low"]) == {0.5} and set(band["high"]) == {4.0}
    assert panel_table(run, "STK-INIT") is None and panels(run, "RMS-JAC") == []


@pytest.mark.parametrize("width", list(WIDTHS))
def test_panels_plot_means_intervals_and_theory(run: Run, width: str) -> None:
    figure = measurement(panels(run, "STK-GROWTH"), width=width)
    assert len(figure.axes) == 2 and figure.get_figwidth() == WIDTHS[width]
    axis = figure.axes[0]
    lines = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
    one = PANEL["measured"][0]
    for values in (one["mean"], PANEL["theory"][0]["y"]):
        assert any(line.shape == (5,) and np.allclose(line, values) for line in lines)
    bars = [c.get_segments() for c in axis.collections if hasattr(c, "get_segments")]
    ends = [np.array([segment[:, 1] for segment in bar]).T for bar in bars]
    assert any(np.allclose(end, [one["low"], one["high"]]) for end in ends)
    band = next(c for c in axis.collections if c.get_label() == "band").get_paths()[0].vertices
    assert band[:, 1].min() == 0.5 and band[:, 1].max() == 4.0
    assert axis.get_yscale() == "log" and axis.get_title(loc="left") == "Growth"
    names = {text.get_text() for text in axis.get_legend().get_texts()}
    assert {"one", "two", "line", "band"} <= names


def test_theory_takes_the_colour_of_what_it_is_about(run: Run) -> None:
    axis = measurement(panels(run, "STK-GROWTH")).axes[0]
    line = next(line for line in axis.get_lines() if line.get_label() == "line")
    band = next(c for c in axis.collections if c.get_label() == "band")
    assert line.get_color() == PALETTE["blue"] and to_hex(band.get_facecolor()[0]) == PALETTE["vermillion"]


def test_theory_of_nothing_measured_is_drawn_too() -> None:
    loose = {**PANEL, "theory": [{"name": "alone", "x": X, "y": [1.0] * 5}]}
    axis = measurement([loose]).axes[0]
    assert "alone" in {text.get_text() for text in axis.get_legend().get_texts()}


@pytest.mark.parametrize("width", list(WIDTHS))
def test_legends_and_labels_lie_inside_the_figure(run: Run, width: str) -> None:
    figures = [
        measurement(panels(run, "STK-GROWTH"), width=width),
        mutant_chart(mutant_table(run), width=width),
    ]
    for figure in figures:
        render(figure, "png")
        with house_style():
            # at the resolution of the file, where glyphs are a little wider than at that of the layout
            figure.set_dpi(200)
            figure.draw_without_rendering()
        frame = figure.bbox
        for axis in figure.axes:
            texts = [axis.xaxis.label, axis.yaxis.label, *shown_ticks(axis.xaxis), *shown_ticks(axis.yaxis)]
            boxes = [t.get_window_extent() for t in texts if t.get_text()]
            boxes += [axis.get_legend().get_window_extent()] if axis.get_legend() else []
            for box in boxes:
                assert box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1
                assert box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1


def test_mutants_are_counted_by_theorem_and_mutation(run: Run) -> None:
    table = mutant_table(run)
    assert table is not None
    counted = {(r["claim"], r["mutation"]): (r["killed"], r["total"]) for _, r in table.iterrows()}
    assert counted == {
        ("RMS-JAC", "eps dropped"): (2, 2),
        ("RMS-JAC", "other"): (1, 1),
        ("RMS-JAC", "made up"): (1, 1),
        ("LN-JAC", "bound tightened"): (1, 2),
        ("STK-GROWTH", NONE): (0, 0),
    }
    assert columns(table) == ["eps dropped", "bound tightened", "other", "made up"]
    text = describe_mutants(table)
    assert "5 of 6 mutants of 2 theorems" in text and "LN-JAC, bound tightened: loose" in text
    assert "without mutants: STK-GROWTH" in text


@pytest.mark.parametrize("rejected", [False, None, "yes"])
def test_only_true_counts_as_rejected(rejected: Any) -> None:
    table = mutant_table(run_of(claim("A", proof(control("x", rejected)))))
    assert table is not None and list(table["killed"]) == [0] and list(table["survivors"]) == ["x"]


@pytest.mark.parametrize("width", list(WIDTHS))
def test_survivors_cannot_be_missed(run: Run, width: str) -> None:
    axis = mutant_chart(mutant_table(run), width=width).axes[0]
    texts = {(text.get_position(), text.get_text()) for text in axis.texts}
    reds = {
        (round(p.get_x() + 0.46), round(p.get_y() + 0.44))
        for p in axis.patches
        if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) == PALETTE["vermillion"]
    }
    # the cell itself and the sum at the end of its row
    assert reds == {(1, 1), (4, 1)}
    assert ((1, 1), "1/2") in texts and ((0, 0), "2") in texts and ((4, 2), NONE) in texts
    assert axis.get_title(loc="left") == "5 of 6 mutants rejected"


def test_no_survivors_are_said_to_be_none(run: Run) -> None:
    table = mutant_table(run_of(CLAIMS[0]))
    assert table is not None and describe_mutants(table).endswith("none survived.")
    axis = mutant_chart(table).axes[0]
    assert not any(to_hex(p.get_facecolor()) == PALETTE["vermillion"] for p in axis.patches)


def test_a_long_ledger_stands_side_by_side_on_a_wide_page() -> None:
    many = run_of(*(claim(f"ABC-{i}", proof(control("x", True))) for i in range(31)))
    narrow, wide = (mutant_chart(mutant_table(many), width=width) for width in ("single", "double"))
    assert len(narrow.axes) == 1 and len(wide.axes) == 2
    names = [label.get_text() for axis in wide.axes for label in axis.get_yticklabels()]
    assert names == [f"ABC-{i}" for i in range(31)]


def test_runs_without_measurements_or_mutants_give_no_figures() -> None:
    empty = run_of(claim("A"), {"id": "B", "status": "open"}, claim("C", {"kind": "smt", "detail": None}))
    assert all(spec.table(empty) is None for spec in THEORY_FIGURES)
    with pytest.raises(InputError, match="panels"):
        measurement([])
    with pytest.raises(InputError, match="mutants"):
        mutant_chart(pd.DataFrame({"claim": [], "mutation": [], "killed": [], "total": []}))
    with pytest.raises(InputError, match="poster"):
        measurement([PANEL], width="poster")


def test_the_gallery_shows_them(run: Run) -> None:
    assert set(THEORY_FIGURES) <= set(FIGURES)
    shown = {exhibit.spec.name: exhibit for exhibit in exhibits(run)}
    assert set(shown) == {"theory-growth", "theory-mutants"}
    assert "one: 1 at depth 1, 16 at depth 16" in shown["theory-growth"].alt
    svg = inline_svg(shown["theory-mutants"].drawings["single"], prefix="p")
    assert "var(--fig-vermillion" in svg and "<script" not in svg


def test_a_decided_ledger_can_be_drawn() -> None:
    from preln.theory import decide

    claims = decide(["RMS-NORM", "STK-UPPER"]).to_json()["claims"]
    table = mutant_table(run_of(*claims))
    assert table is not None and set(table["claim"]) == {"RMS-NORM", "STK-UPPER"}
    assert (table["killed"] == table["total"]).all() and table["total"].sum() > 4
    render(mutant_chart(table), "pdf")
