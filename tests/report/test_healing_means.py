"""Many healing runs as few curves: the best rate by validation, means over seeds, one panel a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.report.healing_exhibits import HEALING_FIGURES, shown_outcomes
from preln.report.healing_means import best_rates, crowded, healing_panels, mean_curves, mean_outcomes
from preln.report.load import Run, load_run

RECIPES = ("head", "lora", "dora", "full", "distill", "seam", "uidl")
RATES = {1e-5: 3.0, 1e-3: 1.0}


@pytest.fixture(scope="module")
def run() -> Run:
    """Two pruned models, seven recipes, two rates, two seeds."""
    heals, curves, prunes = [], [], []
    for metric in ("reverse", "random"):
        drop, before = [3, 4], 10.0
        dense = {"dense_loss": 2.5, "id": f"prune-{metric}-2"}
        prunes.append({**dense, "metric": metric, "drop": drop, "loss": before, "low": 9.0, "high": 11.0})
        for place, recipe in enumerate(RECIPES):
            for rate, extra in RATES.items():
                for seed in (0, 1):
                    name = f"heal-{metric}-2-{recipe}-{rate:g}-s{seed}"
                    end = 3.0 + place * 0.1 + extra + 0.2 * seed
                    told = {"id": name, "metric": metric, "drop": drop, "recipe": name[5:]}
                    told |= {"base_recipe": recipe, "learning_rate": rate, "seed": seed}
                    told |= {"loss_before": before, "loss_after": end, "tokens": 512, "seconds": 9.0 + seed}
                    heals.append(told | {"peak_memory_bytes": 2**30, "trainable_parameters": 10})
                    for step, loss in enumerate((before, (before + end) / 2, end)):
                        row = {"id": name, "metric": metric, "removed": 2, "recipe": name[5:], "step": step}
                        row |= {"tokens": 256 * step, "seconds": 4.0 * step + seed, "loss": loss}
                        curves += [row | {"split": "validation"}, row | {"split": "train", "loss": 99.0}]
    tables = {"training": pd.DataFrame(curves), "heals": tuple(heals), "prunes": tuple(prunes)}
    return Run(Path("many"), "many", {}, {}, (), **tables)


def test_only_many_runs_are_averaged(run: Run, run_folder: Path) -> None:
    assert crowded(run)
    assert not crowded(load_run(run_folder))
    assert len(shown_outcomes(run)) < 1 + 2 + len(run.heals)


def test_the_best_rate_is_that_of_least_validation_loss(run: Run) -> None:
    best = best_rates(run)
    assert len(best) == 2 * len(RECIPES)
    assert set(best["learning_rate"]) == {1e-3}
    # a run that says its validation loss is judged by that, not by the curve's end
    turned = tuple({**heal, "validation_after": -heal["loss_after"]} for heal in run.heals)
    other = Run(run.path, "x", {}, {}, (), heals=turned, training=run.training)
    assert set(best_rates(other)["learning_rate"]) == {1e-5}


def test_curves_are_means_between_least_and_greatest(run: Run) -> None:
    table = mean_curves(run)
    assert len(table) == 2 * len(RECIPES) * 3
    own = run.training[(run.training["split"] == "validation") & (run.training["step"] == 2)]
    for row in table[table["step"] == 2].to_dict("records"):
        stem = f"heal-{row['id']}-0.001-s"
        losses = [own.set_index("id").loc[f"{stem}{seed}", "loss"] for seed in (0, 1)]
        assert (row["loss"], row["low"], row["high"]) == pytest.approx(
            (np.mean(losses), min(losses), max(losses))
        )
        assert row["seconds"] == pytest.approx(8.5)
    assert (table["loss"] < 99).all()  # training losses are not mixed in


def test_outcomes_keep_one_row_a_recipe(run: Run) -> None:
    table = mean_outcomes(run)
    assert list(table["stage"]).count("healed") == 2 * len(RECIPES)
    assert list(table["stage"]).count("pruned") == 2
    row = table[(table["stage"] == "healed") & (table["recipe"] == "lora")].iloc[0]
    assert (row["loss"], row["low"], row["high"]) == pytest.approx((4.2, 4.1, 4.3))
    assert row["learning_rate"] == 1e-3


def test_one_seed_keeps_the_interval_of_its_run(run: Run) -> None:
    heals = [{**h, "low": h["loss_after"] - 0.5, "high": h["loss_after"] + 0.25} for h in run.heals]
    one = replace(run, heals=tuple(h for h in heals if h["seed"] == 0))
    table = mean_outcomes(one)
    rows = table[table["stage"] == "healed"]
    assert len(rows) == 2 * len(RECIPES)
    assert (rows["loss"] - rows["low"]).to_numpy() == pytest.approx(0.5)
    assert (rows["high"] - rows["loss"]).to_numpy() == pytest.approx(0.25)


@pytest.mark.parametrize("x", ["tokens", "seconds"])
def test_panels_plot_the_table(run: Run, x: str) -> None:
    table = mean_curves(run)
    figure = healing_panels(table, 2.5, x=x)
    drawn = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in drawn] == ["reverse −2", "random −2"]
    for axis, (_, own) in zip(drawn, table.groupby("metric", sort=False), strict=True):
        curves = [line for line in axis.get_lines() if len(line.get_xdata()) == 3]
        looks = {(line.get_color(), line.get_marker()) for line in curves}
        assert len(looks) == len(RECIPES)  # no two recipes look alike
        for line, (_, rows) in zip(curves, own.groupby("recipe"), strict=True):
            assert np.array_equal(line.get_ydata(), rows["loss"])
            assert np.array_equal(line.get_xdata(), rows[x])
    with pytest.raises(InputError, match="validation losses"):
        healing_panels(table.iloc[:0])


def test_every_figure_of_healing_describes_itself(run: Run) -> None:
    for spec in HEALING_FIGURES:
        table = spec.table(run)
        assert table is not None
        words = spec.describe(table)
        assert 40 < len(words) < 2000
    seconds = next(spec for spec in HEALING_FIGURES if spec.name == "healing-curves-seconds")
    timeless = Run(run.path, "x", {}, {}, (), heals=run.heals, training=run.training.drop(columns="seconds"))
    assert seconds.table(timeless) is None
