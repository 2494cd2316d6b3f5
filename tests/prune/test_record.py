from __future__ import annotations

import json

import pandas as pd
import pytest

from preln.cli import main
from preln.models import tiny_model
from preln.prune import make_plan, score, write_scores

from .oracles import batch

pytestmark = pytest.mark.integration


def test_what_was_asked_stands_in_the_manifest(tmp_path):
    model, ids = tiny_model("llama", blocks=5), batch()
    table = score(model, ids, ["angular", "sleb"], size=2, protect="sleb", seed=4)
    write_scores(table, model, ids, tmp_path / "out", seed=4)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["size"], manifest["protect"], manifest["seed"]) == (2, "sleb", 4)
    assert manifest["metrics"] == ["angular", "sleb"]
    stored = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    pd.testing.assert_frame_equal(stored, table)
    expected = make_plan(table, "angular", drop=2, protect="sleb").drop
    assert make_plan(stored, "angular", drop=2, protect="sleb").drop == expected


def test_the_command_takes_a_number_and_a_protection(tmp_path, capsys):
    arguments = [
        "score",
        "tiny:llama:5",
        "--metrics",
        "angular,sleb,taylor@1",
        "--drop",
        "2",
        "--protect",
        "uidl",
    ]
    window = ["--sequences", "2", "--length", "16"]
    assert main([*arguments, *window, "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["size"] == 2 and said["protect"] == "uidl"
    first, second = said["order"]["angular"][:2]
    assert abs(first - second) == 1 and 4 not in (first, second)
    assert all(order[-1] == 4 for order in said["order"].values())
    assert len(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "guess,finercut"], "guess"),
        (["--metrics", "sleb", "--drop", "4"], "size 4 of 4"),
        (["--metrics", "sleb", "--protect", "guess"], "guess"),
        (["--metrics", "angular", "--drop", "3", "--protect", "sleb"], "leaves only 2"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    window = ["--sequences", "2", "--length", "16"]
    assert main(["score", "tiny:llama", *arguments, *window, "--out", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
