"""Statistics of likeness, Jacobians, kept accuracy and answers, on tables whose numbers are known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from preln.experiment.sections import Answers, Healing, Pruning, Tasks
from preln.experiment.statistics.alike import near_identity, similarity_by_depth, similarity_by_halves
from preln.experiment.statistics.kept import accuracy_gap, reasoning_excess
from preln.experiment.statistics.registry import MissingData

ENTRY = Healing(recipe="lora", models=("reverse-1",), learning_rate=(1e-4, 1e-3), steps=1, batch_size=1)


class Lab:
    """Stored tables of a study that never ran."""

    num_blocks = 8

    def __init__(self, root, **asked):
        self.root = root
        runs = ENTRY.runs(0)
        names = {f"reverse-1-{run.name}": ("reverse-1", run) for run in runs}
        origin = {"dense": (None, None), "reverse-1": ("reverse-1", None), **names}
        self.study = SimpleNamespace(
            seed=0,
            prune=Pruning(metrics=("reverse",), drop=(1,)),
            heal_runs=runs,
            origin=origin.__getitem__,
            writing=None,
            **{"tasks": None, "answers": None, **asked},
        )

    def path(self, step, file):
        return self.root / step / file

    def result(self, step):
        return json.loads(self.path(step, "result.json").read_text())

    def store(self, step, file, frame):
        self.path(step, file).parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(self.path(step, file))

    def sequences(self, step, measure, values):
        """Values by block, each with a small spread over sequences."""
        rows = [
            (measure, layer, "block", "mean", sequence, value + 0.001 * (sequence - 1.5))
            for layer, value in enumerate(values)
            for sequence in range(4)
        ]
        columns = ["measure", "layer", "site", "statistic", "sequence", "value"]
        self.store(step, "sequences.parquet", pd.DataFrame(rows, columns=columns))


def test_likeness_leaves_the_last_block_out(tmp_path):
    lab = Lab(tmp_path)
    turned = [0.9, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.8]
    lab.sequences("probe", "block_influence", turned)
    halves, depth = similarity_by_halves(lab), similarity_by_depth(lab)
    assert halves.value == pytest.approx(np.mean(turned[4:7]) - np.mean(turned[:4]))
    assert depth.value == -1.0
    assert halves.interval()[1] < 0
    lab.sequences("probe", "block_influence", turned[::-1])  # the other way round it must not hold
    assert similarity_by_halves(lab).value > -0.05
    assert similarity_by_depth(lab).value > 0
    lab.sequences("probe", "block_influence", turned[:3])
    with pytest.raises(MissingData, match="too few blocks"):
        similarity_by_halves(lab)


def test_nearness_to_the_identity_needs_jacobians(tmp_path):
    lab = Lab(tmp_path)
    with pytest.raises(MissingData, match="give the study jacobians"):
        near_identity(lab)
    sigma = [30.0, 9.0, 4.0, 2.0, 1.0, 0.5, 0.4, 7.0]
    lab.sequences("jacobians", "update_sigma", sigma)
    found = near_identity(lab)
    ranks = np.argsort(np.argsort(sigma))
    assert found.value == pytest.approx(np.corrcoef(ranks, np.arange(8))[0, 1])
    assert "below 1 at 2 of 8" in found.note


def documents(accuracies):
    rows = [
        {"task": task, "doc_id": i, "doc_hash": f"{task}{i}", "acc": float(a), "acc_norm": float(a)}
        for task, values in accuracies.items()
        for i, a in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_lost_accuracy_is_that_of_the_model_with_the_lowest_validation_loss(tmp_path):
    names = ("dense", "reverse-1-lora-0.0001", "reverse-1-lora-0.001")
    lab = Lab(tmp_path, tasks=Tasks(names=("a", "b"), models=names))
    outcomes = ([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0])
    for name, own, validation in zip(names, outcomes, (0.0, 2.0, 3.0), strict=True):
        step = "evaluate-dense" if name == "dense" else f"evaluate-heal-{name}"
        lab.store(step, "documents.parquet", documents({"a": own, "b": [1, 0]}))
        lab.path(step, "results.json").write_text(json.dumps({"tasks": {"a": {}, "b": {}}}))
        lab.path(step, "lm_eval.json").write_text("{}")
        lab.path(f"heal-{name}", "").mkdir()
        lab.path(f"heal-{name}", "result.json").write_text(json.dumps({"validation_after": validation}))
    found = accuracy_gap(lab, "reverse-1")
    assert found.value == pytest.approx((3 / 4 - 1 / 4 + 0) / 2)  # the mean over both tasks, of the first
    assert "decided by reverse-1-lora-0.0001" in found.note
    with pytest.raises(MissingData, match="for a healed one"):
        accuracy_gap(Lab(tmp_path), "reverse-1")


def test_reasoning_is_compared_with_knowledge_in_ratios(tmp_path):
    groups = {"knowledge": ("facts",), "reasoning": ("sums",)}
    lab = Lab(tmp_path, answers=Answers(groups=groups, limit=4, models=("dense", "reverse-1")))
    rng = np.random.default_rng(0)
    bits = {task: rng.uniform(5, 9, 6) for task in ("facts", "sums")}
    sizes = np.arange(6) + 3

    def table(scale):
        parts = [
            pd.DataFrame({"task": task, "document": range(6), "bits": scale[task] * own, "bytes": sizes})
            for task, own in bits.items()
        ]
        return pd.concat(parts).assign(bits_per_byte=lambda frame: frame["bits"] / frame["bytes"])

    lab.store("answer-dense", "documents.parquet", table({"facts": 1.0, "sums": 1.0}))
    lab.store("answer-prune-reverse-1", "documents.parquet", table({"facts": 2.0, "sums": 3.0}))
    found = reasoning_excess(lab, "reverse-1")
    assert found.value == pytest.approx(math.log(3 / 2))
    assert found.interval() == pytest.approx((math.log(3 / 2),) * 2)  # every document rose by the same factor
    with pytest.raises(MissingData, match="knowledge and reasoning"):
        reasoning_excess(Lab(tmp_path), None)
