"""A placement study from its file to its verdicts: the same after a kill, honest about what did not train."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

from preln.base.errors import InputError
from preln.base.files import hash_tree
from preln.evaluate import perplexity
from preln.experiment import Engine, dry_run, run_study
from preln.experiment.placement import read_any_study, training
from preln.experiment.placement import steps as work
from preln.experiment.placement.contrasts import ROUNDING, contrast_of, verdict
from preln.experiment.placement.measuring import (
    model_numbers,
    prunable_depth,
    removal_orders,
    removal_table,
)
from preln.experiment.placement.study import Contrast, Training, quantities
from preln.models import drop_blocks
from preln.models.scratch import scratch_model
from preln.prune import score

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
SCHEDULE = Training(
    steps=7, batch_size=3, learning_rate=0.02, warmup_steps=2, eval_every=3, checkpoint_every=2
)


@pytest.fixture
def values(corpus):
    def tokens(sequences, seed, split="train"):
        return {
            "source": str(corpus),
            "sequences": sequences,
            "length": 16,
            "split": split,
            "seed": seed,
        }

    return {
        "kind": "placement",
        "name": "small",
        "question": "does it run?",
        "placements": ["pre", "post"],
        "seeds": [0, 1],
        "sizes": TINY | {"num_hidden_layers": 2},
        "data": {
            "training": tokens(40, 1),
            "validation": tokens(6, 2, "validation"),
            "calibration": tokens(6, 3),
            "evaluation": tokens(6, 4, "validation"),
        },
        "training": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "eval_every": 3,
            "checkpoint_every": 2,
        },
        "hypotheses": [
            contrast("grad_hidden_spearman", state="initial"),
            contrast("prunable_deepest_0.1"),
        ],
    }


def contrast(quantity, state="trained", against="post", direction="below", threshold=0.0, of="pre"):
    return {
        "id": "HYP-PLACEMENT",
        "quantity": quantity,
        "state": state,
        "of": of,
        "against": against,
        "direction": direction,
        "threshold": threshold,
    }


def results(run):
    """Hashes of all results but those that hold times."""
    volatile = ("step.json", "manifest.json", "result.json")
    return {
        name: value
        for name, value in hash_tree(run).items()
        if not name.endswith(volatile) and not name.startswith(".")
    }


def interrupting(function, at):
    """The function, but for an interruption at its ``at``-th call."""
    calls = []

    def instead(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return instead


def test_a_study_runs_and_a_killed_one_ends_the_same(values, write_yaml, tmp_path, monkeypatch):
    study, whole, broken = read_any_study(write_yaml(values)), tmp_path / "whole", tmp_path / "broken"
    planned = dry_run(study, whole)
    assert [step["id"] for step in planned][:2] == ["train-pre-s0", "measure-pre-s0"]
    assert {step["state"] for step in planned} == {"to do"}
    assert not whole.exists()
    summary = run_study(study, whole)
    assert summary["ran"] == [step["id"] for step in planned]
    assert len(summary["verdicts"]) == 2
    assert run_study(study, whole)["ran"] == []
    assert {step["state"] for step in dry_run(study, whole)} == {"kept"}

    for place, name, at in (
        (training, "losses_from_logits", 5),  # in the first training, behind its second checkpoint
        (work, "removal_table", 2),  # in the second measurement
        (work, "verdict", 2),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, interrupting(getattr(place, name), at))
            with pytest.raises(KeyboardInterrupt):
                run_study(study, broken)
    assert run_study(study, broken)["ran"] == ["decide"]
    assert results(broken) == results(whole)

    verdicts = json.loads((whole / "decide" / "verdicts.json").read_text())["verdicts"]
    assert [v["id"] for v in verdicts] == ["HYP-PLACEMENT"] * 2
    assert verdicts[0]["model"] == "pre minus post: grad_hidden_spearman, initial"
    assert verdicts[0]["interval"][0] <= verdicts[0]["value"] <= verdicts[0]["interval"][1]
    for one in verdicts:
        assert all((whole / name).is_file() for name in one["evidence"])
    trained = json.loads((whole / "train-pre-s0" / "result.json").read_text())
    assert trained["loss_after"] < trained["loss_before"]
    assert trained["tokens"] == 6 * 4 * 16

    values["hypotheses"][0]["threshold"] = -0.5
    assert run_study(read_any_study(write_yaml(values)), whole)["ran"] == ["decide"]
    values["training"]["checkpoint_every"] = 1
    assert run_study(read_any_study(write_yaml(values)), whole)["ran"] == []
    values["training"]["learning_rate"] = 0.01
    states = {step["state"] for step in dry_run(read_any_study(write_yaml(values)), whole)}
    assert states == {"to do"}


def test_training_continues_to_the_bit(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens, held = (torch.randint(0, 257, (n, 12), generator=generator) for n in (9, 4))

    def trained(folder):
        model = scratch_model("sandwich", num_hidden_layers=2, **TINY)
        found = training.train(model, tokens, held, SCHEDULE, seed=5, directory=folder)
        return model.state_dict(), found

    weights, undisturbed = trained(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(training, "losses_from_logits", interrupting(training.losses_from_logits, 6))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "broken")
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["step-00000004"]
    again, continued = trained(tmp_path / "broken")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert continued == undisturbed
    assert [r["step"] for r in undisturbed.history if r["split"] == "validation"] == [3, 6, 7]
    # the control: another order of the tokens is another model
    model = scratch_model("sandwich", num_hidden_layers=2, **TINY)
    training.train(model, tokens, held, SCHEDULE, seed=6, directory=tmp_path / "other")
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_model_that_diverges_is_told_and_stops(tmp_path):
    model = scratch_model("pre", num_hidden_layers=2, **TINY)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    found = training.train(
        model, torch.zeros(4, 8).long(), torch.zeros(2, 8).long(), SCHEDULE, seed=0, directory=tmp_path
    )
    assert (found.diverged_at, found.history) == (1, [])


def test_counting_is_a_loop_over_counts():
    generator = torch.Generator().manual_seed(0)
    tokens, held = (torch.randint(0, 5, (n, 7), generator=generator) for n in (6, 3))
    flat = tokens.flatten().tolist()
    pairs = [pair for row in tokens.tolist() for pair in itertools.pairwise(row)]
    p = [(flat.count(v) + 1) / (len(flat) + 5) for v in range(5)]
    single, double = [], []
    for row in held.tolist():
        for a, b in itertools.pairwise(row):
            starts = sum(first == a for first, _ in pairs)
            single.append(-math.log(p[b]))
            double.append(-math.log((pairs.count((a, b)) + 5 * p[b]) / (starts + 5)))
    found = training.baselines(tokens, held, 5)
    assert found == pytest.approx({"unigram": np.mean(single), "bigram": np.mean(double)}, rel=1e-12)


def test_losses_without_blocks_are_those_of_cut_models():
    model = scratch_model("scaled", num_hidden_layers=4, **TINY)
    generator = torch.Generator().manual_seed(0)
    tokens, held = (torch.randint(0, 257, (6, 10), generator=generator) for _ in range(2))
    table = removal_table(model, tokens, held)
    influence = score(model, tokens, ["block_influence"]).sort_values("layer")["score"].to_numpy()
    seen = 0
    for (name, kept), order in removal_orders(influence).items():
        curve = table[(table["order"] == name) & (table["last_kept"] == kept)].sort_values("removed")
        assert curve["removed"].tolist() == [0, 1, 2, 3]
        assert curve["block"].tolist() == [-1, *order[:3]]
        assert not kept or 3 not in order
        for count, loss in zip(curve["removed"], curve["loss"], strict=True):
            cut = drop_blocks(model, order[:count]) if count else model
            assert loss == pytest.approx(perplexity(cut, held).loss, rel=1e-6)
            seen += 1
    assert seen == 16


def test_prunable_depth_is_the_most_that_can_go():
    curve = pd.DataFrame({"removed": [2, 0, 1, 3], "loss": [2.4, 2.0, 2.6, 3.0]})
    assert [prunable_depth(curve, rise) for rise in (0.1, 0.4, 0.6, 1.0)] == [0, 2, 2, 3]


def test_numbers_of_a_model_whose_gradient_halves_with_every_block():
    rows = [("grad_hidden", layer, 0.5**layer) for layer in range(5)]
    rows += [("grad_param", layer, 2.0**layer) for layer in range(4)]
    for name in ("angular_distance", "block_influence"):
        rows += [(name, layer, value) for layer, value in enumerate([0.3, 0.1, 0.05, 0.9])]
    curve = pd.DataFrame({"removed": [0, 1, 2], "loss": [2.0, 2.05, 2.3]})
    curves = [
        curve.assign(order=o, last_kept=k) for o in ("deepest", "block_influence") for k in (False, True)
    ]
    depth = pd.DataFrame(rows, columns=["measure", "layer", "value"])
    found = model_numbers(depth, pd.concat(curves), (0.1, 0.5))
    assert set(found) == set(quantities((0.1, 0.5)))
    assert found["grad_hidden_spearman"] == -1.0
    assert found["grad_param_spearman"] == 1.0
    assert found["grad_hidden_log_ratio"] == pytest.approx(math.log10(16))
    assert found["grad_param_log_ratio"] == pytest.approx(-math.log10(8))
    assert found["angular_distance_deep_minus_shallow"] == pytest.approx(0.05 - 0.2)  # the 0.9 is the last's
    assert (found["prunable_deepest_0.1"], found["prunable_block_influence_keep_last_0.5"]) == (1.0, 2.0)
    assert not any(name.startswith("prunable") for name in model_numbers(depth, None, (0.1,)))


def numbers(quantity, state="trained", **by_placement):
    rows = [(p, s, state, quantity, v) for p, each in by_placement.items() for s, v in enumerate(each)]
    return pd.DataFrame(rows, columns=["placement", "seed", "state", "quantity", "value"])


def test_the_interval_is_students_over_paired_seeds():
    pre, post = [-0.9, -0.8, -1.0], [0.6, 0.9, 0.2]
    table = numbers("grad_hidden_spearman", pre=pre, post=post)
    rule = Contrast(**contrast("grad_hidden_spearman", threshold=-0.5))
    found = contrast_of(rule, table, set())
    oracle = ttest_1samp(np.subtract(pre, post), 0.0).confidence_interval(0.95)
    assert found.interval() == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert verdict(rule, table, set())["status"] == "supported"
    other = Contrast(**contrast("grad_hidden_spearman", threshold=-0.5, direction="above"))
    assert verdict(other, table, set())["status"] == "unsupported"
    wide = numbers("grad_hidden_spearman", pre=[-0.9, 0.9, 0.0], post=post)
    assert verdict(rule, wide, set())["status"] == "inconclusive"
    alone = Contrast(**contrast("grad_hidden_spearman", against=None, threshold=-0.5))
    assert contrast_of(alone, table, set()).value == pytest.approx(-0.9)


def test_seeds_that_agree_on_a_whole_number_leave_the_width_of_rounding():
    table = numbers("prunable_deepest_0.5", pre=[4, 5, 3], post=[2, 3, 1])
    rule = Contrast(**contrast("prunable_deepest_0.5", direction="above", threshold=1.0))
    found = contrast_of(rule, table, set())
    low, high = found.interval()
    assert found.value == 2.0
    assert found.spread == pytest.approx(ROUNDING * 2**0.5)
    assert (high - low) / 2 == pytest.approx(4.30265 * found.spread / 3**0.5, rel=1e-5)
    assert verdict(rule, table, set())["status"] == "inconclusive"
    assert verdict(rule, numbers("prunable_deepest_0.5", pre=[8] * 3, post=[2] * 3), set())["status"] == (
        "supported"
    )


def test_a_model_that_did_not_train_decides_nothing():
    table = numbers("prunable_deepest_0.5", pre=[8, 8, 8], post=[2, 2, 2])
    rule = Contrast(**contrast("prunable_deepest_0.5", direction="above", threshold=1.0))
    fewer = verdict(rule, table, {("post", 1)})
    assert fewer["n"] == 2
    assert "seed 1 left out: post did not train" in fewer["note"]
    assert (
        verdict(rule, table, {("post", 0), ("post", 1)})["status"] == "inconclusive"
    )  # one seed, no interval
    none = verdict(rule, table, {("post", seed) for seed in range(3)})
    assert (none["status"], none["value"], none["n"]) == ("untested", None, 0)
    early = numbers("grad_hidden_spearman", state="initial", pre=[-1, -1, -0.9], post=[1, 1, 0.9])
    start = Contrast(**contrast("grad_hidden_spearman", state="initial", threshold=-0.5))
    assert verdict(start, early, {("post", 0), ("pre", 1)})["n"] == 3  # before training nothing has failed


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("sizes", "hidden_size"), 10, "not a multiple of twice 2 heads"),
        (("training", "warmup_steps"), 6, "not below training.steps"),
        (("placements",), ["pre", "pre"], "placements: one is named twice"),
        (("placements",), ["mid"], "placements.0"),
        (("rises",), [0.5], "no quantity 'prunable_deepest_0.1'"),
        (("hypotheses", 0, "against"), "sandwich", "'sandwich' is none of the study's placements"),
        (("hypotheses", 0, "against"), "pre", "compared with itself"),
        (("hypotheses", 1, "state"), "initial", "only a trained model is pruned"),
        (("extra",), 1, "extra: unknown key"),
        (("training", "steps"), "6", "training.steps"),
    ],
)
def test_a_file_that_makes_no_study_is_refused_in_one_line(values, write_yaml, path, value, line):
    broken = copy.deepcopy(values)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError) as refused:
        read_any_study(write_yaml(broken))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_these_studies_cannot_do_is_refused(values, write_yaml, tmp_path):
    study = read_any_study(write_yaml(values))
    with pytest.raises(InputError, match="models are trained in one of"):
        run_study(study.model_copy(update={"dtype": "bfloat16"}), tmp_path / "a")
    with pytest.raises(InputError, match="placement studies run locally"):
        run_study(study, tmp_path / "a", Engine("ray"))
    assert not (tmp_path / "a").exists()


def test_other_studies_are_read_as_before(study_values, write_yaml):
    assert read_any_study(write_yaml(study_values)).name == "small"
    assert type(read_any_study(write_yaml(study_values))).__name__ == "Study"


def test_the_study_that_is_shipped_compares_what_the_statement_says():
    study = read_any_study(ROOT / "experiments" / "norm-placement.yaml")
    assert set(study.placements) == {"pre", "post", "sandwich", "scaled"}
    assert study.sizes.num_hidden_layers >= 12
    assert len(study.seeds) >= 3
    assert study.data.training.sequences >= study.training.steps * study.training.batch_size  # no text twice
    asked = {(c.quantity.partition("_")[0], c.against) for c in study.hypotheses}
    assert {("grad", "post"), ("prunable", "post"), ("prunable", "scaled")} <= asked
