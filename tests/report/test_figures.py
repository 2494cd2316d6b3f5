"""The figures plot the numbers that they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from preln.base.errors import InputError
from preln.report import figures
from preln.report.load import Run, load_run
from preln.report.style import PALETTE, WIDTHS, inline_svg, plain, render, short
from preln.report.summary import outcomes


@pytest.fixture
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


def lines(figure) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    return [np.asarray(line.get_ydata(), float) for axis in figure.axes for line in axis.get_lines()]


def plotted(figure, values: pd.Series) -> bool:  # type: ignore[no-untyped-def]
    return any(
        line.shape == values.shape and np.array_equal(line, values.to_numpy()) for line in lines(figure)
    )


@pytest.mark.parametrize("width", list(WIDTHS))
def test_depth_profile_plots_means_and_intervals(run: Run, width: str) -> None:
    figure = figures.depth_profile(run.layers, width=width)
    mean = run.layers[run.layers["statistic"] == "mean"]
    for measure in ("residual_rms", "grad_hidden", "grad_param"):
        assert plotted(figure, mean.loc[mean["measure"] == measure, "value"]), measure
    # the largest over tokens is in the table too, and must not be mixed in
    assert all(line.max() < 99 for line in lines(figure))
    rows = mean[mean["measure"] == "grad_param"]
    band = figure.axes[2].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == rows["low"].min()
    assert band.max() == rows["high"].max()
    assert figure.get_figwidth() == WIDTHS[width]
    assert figure.axes[0].get_yscale() == "log"


def test_norm_sigma_plots_value_bound_and_one(run: Run) -> None:
    figure = figures.norm_sigma(run.layers)
    for measure in ("norm_sigma", "norm_sigma_bound"):
        for site in ("attention", "mlp", "final_norm"):
            rows = run.layers[(run.layers["measure"] == measure) & (run.layers["site"] == site)]
            assert plotted(figure, rows["value"]), (measure, site)
    assert any(np.array_equal(line, [1.0, 1.0]) for line in lines(figure))


def test_predicted_damage_points_and_correlation(run: Run) -> None:
    figure = figures.predicted_damage(run.scores, run.damage)
    axis = figure.axes[0]
    points = {
        (float(x), float(y))
        for line in axis.get_lines()
        if line.get_marker() in ("o", "s", "^")
        for x, y in zip(*line.get_data(), strict=True)
    }
    scores = run.scores[run.scores["metric"] == "first_order_damage"].set_index("layer")["score"]
    damage = run.damage.set_index("layer")["delta"]
    assert points == {(float(scores[i]), float(damage[i])) for i in range(6)}
    rho = spearmanr(scores.sort_index(), damage.sort_index()).statistic
    assert f"{rho:.2f}".replace("-", "−") in axis.get_title(loc="left")


def test_predicted_damage_correlation_follows_the_data(run: Run) -> None:
    reversed_damage = run.damage.assign(delta=-run.damage["delta"], low=np.nan, high=np.nan)
    one = figures.predicted_damage(run.scores, run.damage).axes[0].get_title(loc="left")
    other = figures.predicted_damage(run.scores, reversed_damage).axes[0].get_title(loc="left")
    assert one != other


def test_outcome_chart_plots_every_loss(run: Run) -> None:
    table = outcomes(run)
    axis = figures.outcome_chart(table).axes[0]
    spots = {float(x) for line in axis.get_lines() for x in np.atleast_1d(line.get_xdata())}
    assert set(table["loss"]) <= spots
    assert set(table.loc[table["stage"] == "healed", "high"]) <= spots
    assert len(axis.get_yticklabels()) == 3


def test_removal_order_shows_ranks_and_chosen_blocks(run: Run) -> None:
    chosen = {"reverse": [4, 5], "block_influence": [2], "absent": [1]}
    axis = figures.removal_order(run.scores, chosen).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    grid = axis.collections[0].get_array().reshape(len(names), 6)
    for name, row in zip(names, grid, strict=True):
        expected = run.scores[run.scores["metric"] == name].sort_values("layer")["rank"]
        assert np.array_equal(row, expected)
    crosses = {names[int(y)]: [] for y in range(len(names))}
    for line in axis.get_lines():
        for x, y in zip(*line.get_data(), strict=True):
            crosses[names[int(y)]].append(int(x))
    assert crosses == {"reverse": [4, 5], "block_influence": [2], "first_order_damage": []}


@pytest.mark.parametrize("x", ["tokens", "seconds"])
def test_healing_curves_plot_validation_only(run: Run, x: str) -> None:
    figure = figures.healing_curves(run.training, 2.86, x=x)
    curves = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 6]
    assert len(curves) == len(run.heals)
    validation = run.training[run.training["split"] == "validation"]
    for curve, (_, rows) in zip(curves, validation.groupby("id"), strict=True):
        assert np.array_equal(curve.get_ydata(), rows["loss"])
        assert np.array_equal(curve.get_xdata(), rows[x])


def test_empty_tables_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="residual_rms"):
        figures.depth_profile(run.layers.iloc[:0])
    with pytest.raises(InputError, match="taylor"):
        figures.predicted_damage(run.scores, run.damage, metric="taylor")
    with pytest.raises(InputError, match="poster"):
        figures.depth_profile(run.layers, width="poster")


def test_values_that_no_log_axis_holds(run: Run) -> None:
    layers = run.layers.assign(value=run.layers["value"].where(run.layers["layer"] != 2))
    render(figures.depth_profile(layers), "png")
    damage = run.damage.assign(delta=[3.0, -0.01, 0.0, 0.002, 1e-4, -2.0])
    figure = figures.predicted_damage(run.scores, damage)
    assert figure.axes[0].get_yscale() == "symlog"
    render(figure, "png")
    nothing = run.damage.assign(delta=0.0, low=0.0, high=0.0)
    assert "undefined" in figures.predicted_damage(run.scores, nothing).axes[0].get_title(loc="left")


def test_names_are_text_never_mathematics(run: Run, hostile: str) -> None:
    table = outcomes(run).replace("reverse", hostile)
    figure = figures.outcome_chart(table)
    svg = inline_svg(figure, prefix="p")
    assert "<script" not in svg
    assert "<!--" not in svg
    assert short(hostile) in {label.get_text() for label in figure.axes[0].get_yticklabels()}


def test_inline_svg_takes_the_colours_of_the_page(run: Run) -> None:
    svg = inline_svg(figures.depth_profile(run.layers), prefix="one")
    assert "currentColor" in svg
    assert f"var(--fig-blue, {PALETTE['blue']})" in svg
    assert svg.count('id="') == svg.count('id="one-')
    assert svg.startswith("<svg ") and svg.endswith("</svg>")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01, "0.01"), (1500, "1500"), (-2, "−2"), (1e-7, "1e−7"), (50000, "50000"), (3e6, "3e6")],
)
def test_tick_labels_are_plain(value: float, text: str) -> None:
    assert plain(value) == text
