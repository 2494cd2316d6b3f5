"""Costs are those that the steps stored, and what none stored is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from preln.report.costs import cost_groups, cost_view, costs, costs_latex
from preln.report.load import Run, load_run


def test_every_finished_step_has_its_row(run_folder: Path) -> None:
    run = load_run(run_folder)
    table = costs(run).set_index("step")
    assert list(table.index) == [step.id for step in run.steps]
    for heal in run.heals:
        row = table.loc[heal["id"]]
        assert row["training_seconds"] == heal["seconds"]
        assert row["seconds"] == 12.5
        assert row["trainable_parameters"] == heal["trainable_parameters"]
        assert row["recipe"] == heal["recipe"]
    assert table.drop([heal["id"] for heal in run.heals])["trainable_parameters"].isna().all()


def test_groups_are_sums_means_and_largest(run_folder: Path) -> None:
    run = load_run(run_folder)
    groups = cost_groups(run).set_index("what")
    assert groups["steps"].sum() == len(run.steps)
    assert groups["seconds"].sum() == pytest.approx(12.5 * len(run.steps))
    lora = [heal for heal in run.heals if heal["recipe"] == "lora"]
    row = groups.loc["heal: lora"]
    assert row["training_seconds"] == pytest.approx(sum(heal["seconds"] for heal in lora) / len(lora))
    assert row["peak_memory_bytes"] == max(heal["peak_memory_bytes"] for heal in lora)
    assert list(groups.index)[:3] == ["verify", "probe", "score"]
    assert "heal: lora" in costs_latex(cost_groups(run))


def test_what_no_step_stored_is_named(run_folder: Path) -> None:
    shown = cost_view(load_run(run_folder))
    assert shown["missing"] == ["operations"]
    for folder in run_folder.glob("heal-*"):
        path = folder / "result.json"
        told = json.loads(path.read_text()) if (folder / "step.json").is_file() else None
        if told is not None:
            told["operations"] = 2.5e12
            path.write_text(json.dumps(told))
            import hashlib

            step = json.loads((folder / "step.json").read_text())
            step["files"]["result.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
            (folder / "step.json").write_text(json.dumps(step))
    shown = cost_view(load_run(run_folder))
    assert shown["missing"] == [] and shown["operations"]
    assert "2.50e+12" in {row["operations"] for row in shown["rows"]}


def test_a_run_without_steps_has_no_costs() -> None:
    bare = Run(Path("bare"), "bare", {}, {}, ())
    assert cost_view(bare) is None
    assert cost_groups(bare).empty
    assert math.isnan(float(cost_groups(bare)["seconds"].max()))
