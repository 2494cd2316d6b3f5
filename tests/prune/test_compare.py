from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from preln.base.errors import InputError
from preln.cli import main
from preln.models import find_blocks, tiny_model
from preln.prune import compare, leave_one_out, make_plan, orders, removal_losses, score, score_any
from preln.prune.compare import MEASURED, rank_correlations

from .oracles import batch

pytestmark = pytest.mark.integration
METRICS = ["reverse", "angular", "sleb", "block_influence@1", "finercut", "llm_drop_attention", "random"]


@pytest.fixture(scope="module")
def made():
    model, ids = tiny_model("llama", blocks=6), batch()
    return model, ids, (ids + 1) % 90, compare(model, ids, (ids + 1) % 90, METRICS, drops=[3, 1], seed=2)


def test_every_set_is_what_the_criterion_chooses_for_that_size(made):
    model, ids, _, found = made
    chosen = found.damage.set_index(["metric", "drop"])["layers"]
    for drop in (1, 3):
        for name in ("reverse", "angular", "sleb", "block_influence@1", "random"):
            plan = make_plan(score(model, ids, [name], size=drop, seed=2), name, drop=drop)
            assert chosen[name, drop] == ",".join(map(str, plan.drop)), (name, drop)
        assert len(chosen["finercut", drop].split(",")) == 2 * drop
        assert len(chosen["llm_drop_attention", drop].split(",")) == drop


def test_a_window_is_chosen_anew_for_every_size():
    """Negative control for taking the beginning of the largest window."""
    differ = 0
    for seed in range(6):
        model, ids = tiny_model("gpt2", blocks=6, seed=seed), batch()
        sizes = np.random.default_rng(seed).uniform(0.2, 4, 6)
        with torch.no_grad():  # uneven blocks, so that no size has its window at the end
            for size, block in zip(sizes, find_blocks(model)[1], strict=True):
                block.mlp.c_proj.weight.mul_(size)
        found = compare(model, ids, ids, ["angular"], drops=[1, 2, 4])
        chosen = found.damage.set_index(["metric", "drop"])["layers"]
        for drop in (1, 2, 4):
            plan = make_plan(score(model, ids, ["angular"], size=drop), "angular", drop=drop)
            assert chosen["angular", drop] == ",".join(map(str, plan.drop))
        large = make_plan(score(model, ids, ["angular"], size=4), "angular", drop=2).drop
        differ += chosen["angular", 2] != ",".join(map(str, large))
    assert differ


def test_damage_is_the_paired_difference_on_the_other_tokens(made):
    model, _, others, found = made
    table = found.damage.set_index(["metric", "drop"])
    losses = removal_losses(model, others, {"whole": [], "cut": [3, 4, 5]})
    losses = losses.pivot(index="sequence", columns="name", values="loss")
    row = table.loc[("reverse", 3)]
    np.testing.assert_allclose(row["loss"], losses["cut"].mean(), rtol=1e-9)
    np.testing.assert_allclose(row["damage"], (losses["cut"] - losses["whole"]).mean(), rtol=1e-6)
    assert row["low"] <= row["damage"] <= row["high"]
    assert row["n"] == len(others)
    assert table.loc[("dense", 0), "damage"] == 0


def test_measured_damage_stands_beside_the_criteria(made):
    model, _, others, found = made
    alone = leave_one_out(model, others).pivot(index="layer", columns="sequence", values="loss").mean(axis=1)
    mine = found.scores.query("metric == @MEASURED").sort_values("layer")
    np.testing.assert_allclose(mine["score"], (alone - alone[-1]).drop(-1), rtol=1e-6, atol=1e-9)
    assert (mine["rank"].to_numpy() == mine["score"].rank().to_numpy() - 1).all()
    assert list(dict.fromkeys(found.scores["metric"])) == [*METRICS, MEASURED]


def test_correlations_are_scipys(made):
    ranks = made[3].scores.query("half == 'block'").pivot(index="layer", columns="metric", values="rank")
    table = made[3].correlations.set_index(["metric", "other"])
    for a in ranks:
        for b in ranks:
            expected = spearmanr(ranks[a], ranks[b]).statistic
            np.testing.assert_allclose(table.loc[(a, b), "spearman"], expected, atol=1e-12)
            both = set(ranks.index[ranks[a] < 3]) & set(ranks.index[ranks[b] < 3])
            assert table.loc[(a, b), "overlap"] == pytest.approx(len(both) / 3)
    assert "finercut" not in table.index.get_level_values(0)


def test_opposite_orders_correlate_with_minus_one():
    layers = list(range(4))
    up = pd.DataFrame({"metric": "up", "layer": layers, "score": layers, "rank": layers})
    down = up.assign(metric="down", rank=layers[::-1])
    table = rank_correlations(pd.concat([up, down]), 2).set_index(["metric", "other"])
    assert table.loc[("up", "down"), "spearman"] == pytest.approx(-1)
    assert table.loc[("up", "down"), "overlap"] == 0
    assert table.loc[("up", "up"), "overlap"] == 1


def test_protection_holds_in_every_set():
    model, ids = tiny_model("llama", blocks=6), batch()
    found = compare(model, ids, ids, ["reverse", "sleb", "finercut"], drops=[2], protect="sleb")
    for layers in found.damage["layers"].iloc[1:]:
        assert not {"0", "5", "0a", "0m", "5a", "5m"} & set(layers.split(","))


@pytest.mark.parametrize("drops", [[], [0], [6], [5], [True]])
def test_sizes_that_cannot_be_are_refused(drops):
    with pytest.raises(InputError, match="give sizes from 1 to 4"):
        compare(tiny_model("llama", blocks=6), batch(), batch(), ["reverse"], drops=drops, protect="sleb")


def test_halves_and_blocks_in_one_table():
    model, ids = tiny_model("llama", blocks=4), batch()
    table = score_any(model, ids, "reverse,llm_drop_mlp")
    assert set(table["half"]) == {"block", "mlp"}
    found = orders(table)
    assert found["reverse"] == [3, 2, 1, 0]
    assert sorted(found["llm_drop_mlp"]) == ["0m", "1m", "2m", "3m"]
    pd.testing.assert_frame_equal(score_any(model, ids, "all"), score(model, ids, "all"))
    both = score_any(model, ids, "llm_drop_mlp,all,sleb")["metric"]
    assert set(both) == {"llm_drop_mlp", "sleb", *score(model, ids, "all")["metric"]}


def test_the_command_writes_all_three_tables(tmp_path, capsys):
    words = ["score", "tiny:llama:5", "--metrics", "reverse,angular,finercut", "--damage", "1,2"]
    words += [
        "--sequences",
        "2",
        "--validation-sequences",
        "3",
        "--length",
        "16",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["order"]["reverse"] == [4, 3, 2, 1, 0] and len(said["order"]["finercut"]) == 10
    damage = pd.read_parquet(tmp_path / "out" / "damage.parquet")
    assert len(damage) == 7 and len(said["damage"]) == 7
    assert len(pd.read_parquet(tmp_path / "out" / "correlations.parquet")) == 9
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["held_out"]["shape"] == [3, 16]
    assert (manifest["size"], manifest["protect"]) == (2, "none")
    assert manifest["held_out"]["sha256"] != manifest["tokens"]["sha256"]


def test_one_sequence_has_no_interval_and_the_json_stays_json(capsys):
    words = ["score", "tiny:llama:3", "--metrics", "reverse", "--damage", "1", "--json"]
    assert main([*words, "--sequences", "1", "--length", "16"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["damage"][1]["low"] is None


def test_two_ways_to_name_a_size_are_refused(capsys):
    assert main(["score", "tiny:llama:3", "--damage", "1", "--drop", "1"]) == 2
    assert "leave --drop out" in capsys.readouterr().err
