"""The page of healing: means over seeds, best rates, a figure, parts that hold the numbers."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.report.healing_study import healing_runs, healing_study, parts, recipe_means
from preln.report.load import Run, load_run
from preln.report.markdown import fill
from preln.report.style import render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "healing-smollm2-135m"
LOSSES = {("partial-3", 1e-5): 8.0, ("partial-3", 1e-3): 4.0, ("lora", 1e-5): 9.0, ("lora", 1e-3): 5.0}


@pytest.fixture
def run():
    heals, curves = [], []
    for metric in ("reverse", "random"):
        for (recipe, rate), loss in LOSSES.items():
            for seed in (0, 1):
                name = f"heal-{metric}-2-{recipe}-{rate:g}-s{seed}"
                own = loss + seed
                heals.append(
                    {
                        **{
                            "id": name,
                            "metric": metric,
                            "drop": [3, 4],
                            "recipe": name,
                            "base_recipe": recipe,
                        },
                        **{"learning_rate": rate, "seed": seed, "loss_before": 10.0, "loss_after": own},
                        # validation prefers the smaller rate of LoRA, though the loss measured later does not
                        "validation_after": -own if recipe == "lora" else own,
                        **{
                            "tokens": 64,
                            "seconds": 1.0,
                            "peak_memory_bytes": 2**30,
                            "trainable_parameters": 10,
                        },
                    }
                )
                for step, value in enumerate((10.0, own)):
                    curves.append((name, metric, 2, name, step, 64 * step, "validation", value))
    columns = ["id", "metric", "removed", "recipe", "step", "tokens", "split", "loss"]
    return Run(
        Path("run"), "run", {}, {}, (), heals=tuple(heals), training=pd.DataFrame(curves, columns=columns)
    )


def test_means_are_over_seeds_and_validation_chooses_the_rate(run):
    table = recipe_means(healing_runs(run)).set_index(["model", "recipe", "learning_rate"])
    row = table.loc[("reverse-2", "partial-3", 1e-3)]
    assert (row["loss"], row["low"], row["high"], row["seeds"]) == (4.5, 4.0, 5.0, 2)
    best = table.loc[table["best"]].reset_index()
    chosen = {(m, r): rate for m, r, rate in best[["model", "recipe", "learning_rate"]].to_numpy()}
    assert chosen[("reverse-2", "partial-3")] == 1e-3
    assert chosen[("reverse-2", "lora")] == 1e-5  # by validation, not by the loss that is reported


def test_the_figure_draws_every_recipe_on_every_model(run):
    figure = healing_study(run)
    assert len(figure.axes) == 4
    left, right = figure.axes[:2]
    curves = [
        line.get_ydata() for line in left.lines if len(line.get_xdata()) == 2 and max(line.get_xdata()) > 1
    ]
    assert sorted(float(curve[-1]) for curve in curves) == [4.5, 9.5]
    assert right.get_xscale() == "log"
    figure.draw_without_rendering()
    shown = [label.get_text() for label in right.get_xticklabels()]
    assert "1e-5" in shown and "1e-3" in shown and not any("$" in text for text in shown)
    assert render(figure, "png") == render(healing_study(run), "png")


def test_a_pause_of_the_machine_is_no_time_of_a_recipe(run):
    seconds = [2.0, 4.0, 1004.0, 1006.0, 1008.0]
    name = run.heals[0]["id"]
    rows = [(name, "reverse", 2, name, step + 1, 64, "train", 5.0, at) for step, at in enumerate(seconds)]
    training = pd.DataFrame(rows, columns=[*run.training.columns, "seconds"])
    heals = tuple(heal | {"steps": 5} for heal in run.heals)
    found = healing_runs(replace(run, heals=heals, training=training)).set_index("id")["seconds"]
    assert found[name] == 10.0
    assert found[heals[1]["id"]] == 1.0  # no curve: what the step says


def test_nothing_healed_is_refused(run):
    with pytest.raises(InputError):
        healing_study(Run(Path("run"), "run", {}, {}, ()))


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the study of healing is not committed")
def test_the_page_is_what_the_committed_run_says():
    page = ROOT / "docs" / "healing-study.md"
    assert fill(page, parts(RESULTS)) == page.read_text(encoding="utf-8")
    picture = render(healing_study(load_run(RESULTS)), "png")
    assert (ROOT / "docs" / "healing_study.png").read_bytes() == picture
