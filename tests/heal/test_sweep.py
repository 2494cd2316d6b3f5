from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.cli import main
from preln.heal import sweep as sweep_of
from preln.heal import train
from preln.heal.command import dropped_blocks
from preln.heal.sweep import read_grid, summary
from preln.models import tiny_model

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration
COMMON = {"steps": 4, "batch_size": 4, "warmup_steps": 1}


def run(folder, **options):
    told = {"recipes": ["head", "partial-1", "lora"], "grid": {"learning_rate": [1e-4, 5e-3]}, "seeds": 2}
    model = tiny_model("llama")
    held_out = random_tokens(4, seed=1)
    return sweep_of(
        model, random_tokens(), validation=held_out, folder=folder, **{**told, **COMMON, **options}
    )


def test_every_run_equals_the_same_run_by_itself(tmp_path):
    table, histories = run(tmp_path)
    assert len(table) == 3 * 2 * 2
    for row in table.to_dict("records"):
        plan = settings(**COMMON, learning_rate=row["learning_rate"], seed=row["seed"])
        alone = train(
            tiny_model("llama"),
            random_tokens(),
            validation=random_tokens(4, seed=1),
            recipe=row["recipe"],
            settings=plan,
        )
        assert row["loss_after"] == pytest.approx(alone.manifest["loss_after"], rel=1e-5)
        mine = histories.query("recipe == @row['recipe'] and seed == @row['seed']")
        mine = mine[mine["learning_rate"] <= row["learning_rate"]]
        assert len(mine) >= len(alone.history)
    losses = table.set_index(["recipe", "learning_rate", "seed"])["loss_after"]
    assert losses["partial-1", 5e-3, 0] != losses["partial-1", 5e-3, 1]  # seeds order the rows
    assert losses["partial-1", 5e-3, 0] != losses["partial-1", 1e-4, 0]


def test_one_pass_serves_all_recipes_with_a_frozen_prefix(tmp_path, monkeypatch):
    from preln.heal.prefix import states as prefix

    filled = []
    fill = prefix._fill
    monkeypatch.setattr(prefix, "_fill", lambda *args: (filled.append(args[-1]), fill(*args)))
    run(tmp_path, recipes=["head", "partial-1", "partial-3"], seeds=1)
    assert sorted(row for rows in filled for row in rows) == sorted([*range(12), *range(4)])


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    table, _ = run(tmp_path, recipes=["head"])
    home = sys.modules["preln.heal.sweep"]  # the room's name of the same word is the function

    def refused(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(home, "train", refused)
    again, _ = run(tmp_path, recipes=["head"])
    pd.testing.assert_frame_equal(table, again)
    with pytest.raises(AssertionError, match="trained again"):
        run(tmp_path, recipes=["head"], steps=5)


def test_the_summary_is_over_seeds(tmp_path):
    table, _ = run(tmp_path, recipes=["head"], seeds=3)
    lines = summary(table)
    assert lines["loss"].is_monotonic_increasing and (lines["seeds"] == 3).all()
    for row in lines.to_dict("records"):
        mine = table.query("learning_rate == @row['learning_rate']")["loss_after"]
        assert row["loss"] == pytest.approx(np.mean(mine))
        assert row["low"] <= row["loss"] <= row["high"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ["guess"]}, "unknown"),
        ({"grid": {"guess": [1]}}, "guess"),
        ({"grid": {"learning_rate": [-1.0]}}, "learning_rate"),
        ({"recipes": []}, "nothing to run"),
    ],
)
def test_mistakes_are_found_before_the_first_run(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("word", ["learning_rate", "=1", "learning_rate=", "learning_rate=1,,2", "seed=1,2"])
def test_a_grid_that_makes_no_sense_is_refused(word):
    with pytest.raises(InputError, match="--sweep"):
        read_grid([word])


def test_the_command_writes_tables(tmp_path, capsys):
    words = ["heal", "tiny:llama:3", "--recipe", "head,partial-1", "--sweep", "learning_rate=1e-4,1e-3"]
    words += ["--seeds", "2", "--steps", "2", "--batch-size", "2", "--sequences", "4", "--length", "16"]
    words += ["--validation-sequences", "2", "--out", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["best"]["recipe"] in ("head", "partial-1")
    assert len(pd.read_parquet(tmp_path / "out" / "sweep.parquet")) == 8
    assert len(pd.read_parquet(tmp_path / "out" / "summary.parquet")) == 4
    assert not (tmp_path / "out.resume").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "head,lora"], "need --sweep"),
        (["--recipe", "distill"], "--teacher"),
        (["--recipe", "lora", "--set", "rank"], "rank=16"),
        (["--recipe", "lora", "--set", "guess=1"], "guess"),
        (["--recipe", "head", "--cache", "on", "--cache-budget", "1e-9"], "cache"),
    ],
)
def test_the_command_refuses_in_one_line(words, message, tmp_path, capsys):
    base = ["heal", "tiny:llama:3", "--sequences", "2", "--length", "16", "--validation-sequences", "2"]
    out = ["--steps", "2", "--batch-size", "2", "--out", str(tmp_path / "out")]
    assert main([*base, *words, *out]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_the_command_changes_any_field(tmp_path, capsys):
    words = ["heal", "tiny:llama:3", "--recipe", "lora", "--set", "rank=2", "--set", "schedule=cosine"]
    words += ["--sequences", "2", "--length", "16", "--validation-sequences", "2", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["adapter"]["rank"] == 2 and manifest["settings"]["schedule"] == "cosine"


def test_the_command_learns_from_a_teacher(tmp_path, capsys):
    assert main(["prune", "tiny:llama:4", "--layers", "2", "--out", str(tmp_path / "small")]) == 0
    words = [
        "heal",
        str(tmp_path / "small"),
        "--teacher",
        "tiny:llama:4",
        "--sequences",
        "2",
        "--length",
        "16",
    ]
    words += ["--validation-sequences", "2", "--steps", "2", "--batch-size", "2"]
    for recipe in ("distill", "seam"):
        out = tmp_path / recipe
        assert main([*words, "--recipe", recipe, "--out", str(out)]) == 0, recipe
        assert json.loads((out / "manifest.json").read_text())["teacher"]["drop"] == [2]


@pytest.mark.parametrize("layers", ["1-2-9", "5-5", "2,2", "3a", "x"])
def test_dropped_blocks_that_make_no_sense_are_refused(layers):
    with pytest.raises(InputError):
        dropped_blocks("tiny:llama", layers)


def test_dropped_blocks_are_half_open_and_come_from_a_plan(tmp_path):
    assert dropped_blocks("tiny:llama", "1,4-6") == [1, 4, 5]
    assert dropped_blocks(str(tmp_path), None) is None
    (tmp_path / "plan.yaml").write_text("drop: [2, 3]\n")
    assert dropped_blocks(str(tmp_path), None) == [2, 3]
    (tmp_path / "plan.yaml").write_text("drop: [2,\n")
    with pytest.raises(InputError, match="by --dropped"):
        dropped_blocks(str(tmp_path), None)
