"""Loss and accuracy by the number of removed blocks, and names that tell variants apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from preln.base.errors import InputError
from preln.report.collapse_figures import COLLAPSE, collapse_curves, collapse_table
from preln.report.load import Run, load_run
from preln.report.style import WIDTHS, render

RUN = Path(__file__).parents[2] / "experiments" / "results" / "uidl-smollm2-135m"


@pytest.fixture(scope="module")
def run() -> Run:
    return load_run(RUN)


def stored(step: str, name: str = "result.json") -> dict:
    return json.loads((RUN / step / name).read_text())


def test_every_point_is_what_its_step_measured(run):
    table = collapse_table(run).set_index(["panel", "metric", "stage", "removed"])
    assert table.loc[("loss", "reverse", "pruned", 8), "value"] == stored("prune-reverse-8")["loss"]
    kept = stored("prune-reverse-8-uidl")
    assert table.loc[("loss", "reverse (uidl)", "pruned", 8), "value"] == kept["loss"]
    assert 29 not in kept["drop"] and 29 in stored("prune-reverse-8")["drop"]
    healed = stored("heal-reverse-8-uidl-healed")
    assert table.loc[("loss", "reverse (uidl)", "healed", 8), "value"] == healed["loss_after"]
    assert ("loss", "reverse", "healed", 8) not in table.index
    assert table.loc[("loss", "", "dense", 0), "value"] == kept["dense_loss"]
    tasks = stored("evaluate-prune-angular-4-uidl", "results.json")["tasks"].values()
    row = table.loc[("accuracy", "angular (uidl)", "pruned", 4)]
    assert row["value"] == pytest.approx(sum(task["acc"] for task in tasks) / 4)
    error = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / 4
    assert (row["high"] - row["low"]) / 2 == pytest.approx(1.96 * error)


def test_the_recipe_of_least_loss_stands_for_several(run):
    first = next(heal for heal in run.heals if heal["id"] == "heal-angular-4-uidl-healed")
    worse = first | {"id": "heal-angular-4-uidl-other", "recipe": "other", "loss_after": 99.0}
    table = collapse_table(replace(run, heals=(*run.heals, worse)))
    assert table.equals(collapse_table(run))


def test_two_sizes_make_no_curve(run):
    few = replace(
        run,
        prunes=tuple(prune for prune in run.prunes if len(prune["drop"]) in (2, 4)),
        heals=tuple(heal for heal in run.heals if len(heal["drop"]) in (2, 4)),
    )
    assert collapse_table(few).empty
    assert COLLAPSE.table(few) is None
    with pytest.raises(InputError, match="3 numbers of blocks"):
        collapse_curves(collapse_table(few))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_figure_shows_every_line(run, width):
    table = collapse_table(run)
    figure = collapse_curves(table, width=width)
    loss, accuracy = figure.axes
    drawn = {tuple(line.get_xydata()[-1]) for line in loss.lines if len(line.get_xydata())}
    for _, own in table.query("panel == 'loss' and stage != 'dense'").groupby(["metric", "stage"]):
        assert (own["removed"].iloc[-1], own["value"].iloc[-1]) in drawn
    assert accuracy.get_ylabel() == "mean accuracy" and loss.get_ylabel().startswith("held-out loss")
    assert render(figure, "png") == render(collapse_curves(table, width=width), "png")


def test_the_words_say_what_is_shown(run):
    said = COLLAPSE.describe(collapse_table(run))
    assert "reverse (uidl), healed: loss 12.07 without 8 blocks, 14.54 without 15" in said
