"""The layer explorer's cells are the run's numbers; pruned blocks are those of the plans."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from preln.report.explorer import explorer, measures
from preln.report.load import Run, load_run


@pytest.fixture
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


def drawn(row: dict) -> list[float | None]:  # type: ignore[type-arg]
    return [float(cell["drawn"].split()[0]) if cell["drawn"] else None for cell in row["cells"]]


def test_cells_are_the_stored_means(run: Run) -> None:
    shown = explorer([run])
    assert shown is not None
    means = run.layers[run.layers["statistic"] == "mean"].set_index(["measure", "site", "layer"])
    seen = 0
    for row in shown["rows"]:
        if row["measure"] in set(run.layers["measure"]):
            for layer, value in enumerate(drawn(row)):
                key = (row["measure"], row["site"], layer)
                assert (value is not None) == (key in means.index)
                if value is not None:
                    assert value == pytest.approx(means.loc[key, "value"], rel=1e-4)
                    seen += 1
    assert seen == len(means)


def test_intervals_scores_and_damage_are_there(run: Run) -> None:
    rows = {(row["measure"], row["site"]): row for row in explorer([run])["rows"]}
    first = run.damage.iloc[0]
    parts = [float(word) for word in rows["damage", "block"]["cells"][0]["drawn"].split()]
    assert parts == pytest.approx([first["delta"], first["low"], first["high"]], rel=1e-4)
    for metric in run.scores["metric"].unique():
        own = run.scores[run.scores["metric"] == metric].sort_values("layer")["score"]
        row = rows[f"score: {metric}", "block"]
        assert drawn(row)[:6] == pytest.approx(list(own), rel=1e-4, abs=1e-9)
        assert len(row["cells"][0]["drawn"].split()) == 1  # scores have no interval


def test_plans_mark_the_pruned_blocks_and_no_others(run: Run) -> None:
    shown = explorer([run])
    assert shown["blocks"] == 6
    plans = {plan["name"]: plan["cells"] for plan in shown["plans"]}
    for prune in run.prunes:
        cells = plans[f"{prune['metric']}-{len(prune['drop'])}"]
        assert [layer for layer, cell in enumerate(cells) if cell] == sorted(prune["drop"])


def test_several_runs_stand_beside_each_other(run: Run) -> None:
    other = Run(run.path, run.name, {}, {}, (), layers=run.layers.assign(value=run.layers["value"] * 2))
    shown = explorer([run, other])
    assert shown["runs"] == ["quickstart", "quickstart (2)"]
    rows = {(row["run"], row["measure"], row["site"]): drawn(row) for row in shown["rows"]}
    for (place, *key), values in rows.items():
        if place == 1:
            pairs = list(zip(rows[0, *key], values, strict=True))
            assert all((one is None) == (two is None) for one, two in pairs)
            known = [(one, two) for one, two in pairs if one is not None]
            assert [two for _, two in known] == pytest.approx([2 * one for one, _ in known], rel=1e-3)
    # a measure's rows are neighbours, so that the table reads across runs
    order = [row["measure"] for row in shown["rows"]]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index)


def test_a_deeper_run_gives_the_axis(run: Run) -> None:
    rows = [{"measure": "residual_rms", "layer": n, "site": "block", "statistic": "mean", "value": 1.0 + n}
            for n in range(12)]  # fmt: skip
    deep = Run(run.path, "deep", {}, {}, (), layers=pd.DataFrame(rows))
    shown = explorer([run, deep])
    assert shown["layers"] == list(range(12))
    assert {len(row["cells"]) for row in shown["rows"]} == {12}


def test_a_pruned_models_gradients_stand_at_the_blocks_numbers(run: Run) -> None:
    drop = [1, 3]
    frame = pd.DataFrame(
        {"measure": "grad_param", "layer": [0, 1, 2, 2], "site": ["block", "block", "block", "attention"]}
    ).assign(statistic="mean", value=[5.0, 6.0, 7.0, 8.0])
    prune = {"id": "prune-x-2", "metric": "x", "drop": drop, "loss": 1.0}
    found = measures(replace(run, prunes=(prune,), shifts={"prune-x-2": frame}))
    own = found[found["measure"] == "grad_param, x-2"].set_index(["site", "layer"])["value"]
    assert own.to_dict() == {("block", 0): 5.0, ("block", 2): 6.0, ("block", 4): 7.0, ("attention", 4): 8.0}
    without = measures(replace(run, prunes=(prune,), shifts={}))
    assert not without["measure"].str.contains(", x-2").any()


def test_nothing_by_depth_gives_no_explorer() -> None:
    bare = Run(Path("bare"), "bare", {}, {}, ())
    assert explorer([bare]) is None
    assert measures(bare).empty


def test_values_that_are_no_numbers_are_not_drawn(run: Run) -> None:
    layers = run.layers.assign(value=run.layers["value"].where(run.layers["layer"] != 2, math.inf))
    shown = explorer([Run(run.path, "x", {}, {}, (), layers=layers)])
    assert all(row["cells"][2] == {"text": "–", "drawn": ""} for row in shown["rows"])
