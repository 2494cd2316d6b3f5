"""Statistics of healed models against hand-made tables whose answers are known."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from preln.experiment.sections import Healing, Pruning, healed_name
from preln.experiment.statistics.decisions import status
from preln.experiment.statistics.healed import best, healed
from preln.experiment.statistics.healing import (
    heal_cost,
    partial_fair,
    partial_in_time,
    partial_published,
    partial_tuned,
    qlora_worse,
    qlora_worse_and_slower,
    reverse_healed,
    tail_order,
)
from preln.experiment.statistics.registry import MissingData
from preln.experiment.statistics.shift import tail_shift

N, SEEDS, STEPS = 6, 3, 4
HARD = np.linspace(0, 5, N)  # sequences differ far more than recipes do


class Run:
    """A stand-in for the lab: a folder of healed models."""

    num_blocks = 5

    def __init__(self, root):
        self.root, self.entries = root, []
        self.study = SimpleNamespace(
            seed=0,
            prune=Pruning(metrics=("reverse", "random"), drop=(2,), probe=("reverse-2",)),
            heal_runs=(),
        )

    def path(self, step, file):
        return self.root / step / file

    def result(self, step):
        return json.loads((self.root / step / "result.json").read_text())

    def heal(self, recipe, losses, *, models=("reverse-2",), each=1.0, memory=1e9, tokens=64, cache=None):
        """Losses by rate; each run's seconds an update."""
        rates = tuple(losses)
        entry = Healing(
            recipe=recipe,
            models=models,
            learning_rate=rates,
            seeds=tuple(range(SEEDS)),
            steps=STEPS,
            batch_size=1,
        )
        self.entries.append(entry)
        self.study.heal_runs = tuple(run for e in self.entries for run in e.runs(0))
        for run in entry.runs(0):
            for model in models:
                self._write(model, run, losses[run.learning_rate], each, memory, tokens, cache)
        return self

    def _write(self, model, run, loss, each, memory, tokens, cache):
        folder = self.root / f"heal-{healed_name(model, run)}"
        folder.mkdir(parents=True)
        own = loss + 0.01 * run.seed
        pd.DataFrame({"sequence": range(N), "loss": own + HARD, "tokens": 31}).to_parquet(
            folder / "sequences.parquet"
        )
        rows = [(0, 0, 0.0, "validation", 9.0)]
        for step in range(1, STEPS + 1):
            rows += [(step, 16 * step, each * step, "train", 8.0)]
            rows += [(step, 16 * step, each * step, "validation", 9.0 + (own - 9.0) * step / STEPS)]
        pd.DataFrame(rows, columns=["step", "tokens", "seconds", "split", "loss"]).to_parquet(
            folder / "training.parquet"
        )
        told = {"learning_rate": run.learning_rate, "tokens": tokens, "loss_before": 9.0, "steps": STEPS}
        told |= {
            "metric": model.rpartition("-")[0],
            "drop": [3, 4],
            "base_recipe": run.recipe,
            "cache": cache,
        }
        told |= {"peak_memory_bytes": memory, "forward_seconds_per_token": 1 / 64, "validation_after": own}
        (folder / "result.json").write_text(json.dumps(told))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_groups_average_seeds_and_the_best_is_chosen_on_validation(run):
    run.heal("lora", {1e-5: 4.0, 1e-3: 2.0})
    groups = healed(run, None, ("lora",))
    assert [group.name for group in groups] == ["lora-1e-05", "lora-0.001"]
    assert groups[0].loss == pytest.approx(4.0 + 0.01 + HARD.mean())
    assert best(groups, "lora").name == "lora-0.001"
    with pytest.raises(MissingData):
        best(healed(run, "random-2", ("lora",)), "lora")


def test_draws_are_the_plain_bootstrap_over_sequences_and_seeds(run):
    group = healed(run.heal("lora", {1e-5: 4.0}), None, ("lora",))[0]
    rng, twin = np.random.default_rng(5), np.random.default_rng(6)
    sequences, seeds = rng.integers(0, N, (1000, N)), twin.integers(0, SEEDS, (1000, SEEDS))
    slow = [group.losses[np.ix_(s, q)].mean() for q, s in zip(sequences, seeds, strict=True)]
    assert np.allclose(group.draws(5), slow)
    assert not np.allclose(group.draws(5), [group.losses[:, q].mean() for q in sequences])


def test_published_rates_are_compared_in_pairs_at_equal_tokens(run, tmp_path):
    run.heal("partial-3", {1e-5: 2.0, 1e-3: 1.0}).heal("lora", {1e-5: 2.5, 1e-3: 1.1})
    found = partial_published(run, "reverse-2")
    assert found.value == pytest.approx(-0.5)
    assert found.interval() == pytest.approx((-0.5, -0.5))  # what sequences and seeds share cancels
    assert "reverse-2, 64 tokens, 3 seeds" in found.note
    other = Run(tmp_path / "b").heal("partial-3", {1e-5: 2.0}).heal("lora", {1e-3: 2.0})
    with pytest.raises(MissingData, match="lora at 1e-05"):
        partial_published(other, None)
    unequal = Run(tmp_path / "c").heal("partial-3", {1e-5: 2.0}).heal("lora", {1e-5: 2.0}, tokens=128)
    with pytest.raises(MissingData, match="equal tokens"):
        partial_published(unequal, None)


def test_the_fair_comparison_takes_each_ones_best_rate_and_the_worse_of_both_budgets(run):
    run.heal("partial-3", {1e-5: 3.0, 1e-3: 2.0}).heal("lora", {1e-5: 4.0, 1e-3: 1.9}, each=2.0)
    tokens, time, both = (f(run, "reverse-2") for f in (partial_tuned, partial_in_time, partial_fair))
    assert tokens.value == pytest.approx(0.1)
    # LoRA is half as fast: at 4 s it has gone half of the way from 9 to 1.91
    assert time.value == pytest.approx(2.01 - (9 + 1.91) / 2)
    assert both.value == pytest.approx(0.1)
    assert status(both.interval(), 0.0, "below") == "unsupported"
    assert status(time.interval(), 0.0, "below") == "supported"


def test_stored_states_are_charged_a_forward_pass(run):
    run.heal("partial-3", {1e-5: 3.0, 1e-3: 2.0}, cache={"depth": 1})
    assert healed(run, None, ("partial-3",))[0].seconds() == pytest.approx([STEPS + 1.0] * SEEDS)
    assert healed(run, None, ("partial-3",))[0].validation_at(1.0) == pytest.approx([9.0] * SEEDS)


def test_a_busy_minute_does_not_decide_the_time(run):
    group = healed(run.heal("lora", {1e-5: 3.0}), None, ("lora",))[0]
    group.curves[0].loc[group.curves[0]["step"] == STEPS, "seconds"] += 100.0
    assert group.seconds() == pytest.approx([STEPS] * SEEDS)


@pytest.mark.parametrize(("last", "verdict"), [(2.6, "supported"), (2.8, "unsupported")])
def test_tail_order_looks_at_the_worst_step(run, last, verdict):
    for recipe, loss in {"head": 3.0, "partial-1": 2.9, "partial-2": 2.7, "partial-3": last}.items():
        run.heal(recipe, {1e-4: 5.0, 1e-3: loss})
    found = tail_order(run, None)
    assert found.value == pytest.approx(last - 2.7 if last > 2.7 else -0.1)
    assert status(found.interval(), 0.0, "below") == verdict


@pytest.mark.parametrize(
    ("loss", "each", "value"), [(2.2, 3.0, 0.2), (1.9, 3.0, -0.1), (9.9, 0.5, np.log(0.5))]
)
def test_qlora_must_be_worse_and_slower(run, loss, each, value):
    run.heal("lora", {1e-4: 2.5, 1e-3: 2.0}).heal("qlora", {1e-3: loss}, each=each)
    assert qlora_worse_and_slower(run, None).value == pytest.approx(value)
    assert qlora_worse(run, None).value == pytest.approx(loss - 2.0)


@pytest.mark.parametrize(("each", "memory", "verdict"), [(0.5, 1e9, "supported"), (0.5, 1.2e9, "unsupported"),
                                                         (2.0, 1e9, "unsupported")])  # fmt: skip
def test_heal_cost_wants_less_time_at_about_the_memory(run, each, memory, verdict):
    run.heal("partial-3", {1e-5: 3.0, 1e-3: 2.0}, each=each, memory=memory).heal(
        "lora", {1e-5: 4.0, 1e-3: 1.9}
    )
    assert status(heal_cost(run, None).interval(), 0.0, "below") == verdict


def test_reverse_healed_takes_the_run_that_healed_most_metrics(run):
    run.heal("lora", {1e-4: 1.0})
    with pytest.raises(MissingData):
        reverse_healed(run)
    run.heal("partial-3", {1e-3: 2.0}, models=("reverse-2",))
    run.heal("head", {1e-3: 3.0}, models=("reverse-2", "random-2"))
    assert reverse_healed(run).value == 0.0


def test_tail_shift_counts_the_same_modules_before_and_after(run):
    def write(step, blocks, head):
        folder = run.root / step
        folder.mkdir()
        sites = [("block", layer, value) for layer, value in enumerate(blocks)]
        sites += [("final_norm", len(blocks), 0.0), ("head", len(blocks), head)]
        rows = [("grad_param", site, layer, value, N) for site, layer, value in sites]
        rows += [("grad_param", "q", 0, 99.0, N)]
        columns = ["measure", "site", "layer", "value", "n"]
        pd.DataFrame(rows, columns=columns).to_parquet(folder / "layers.parquet")
        draws = [("grad_param", s, layer, d, v) for s, layer, v in sites for d in range(5)]
        columns = ["measure", "site", "layer", "draw", "value"]
        pd.DataFrame(draws, columns=columns).to_parquet(folder / "resamples.parquet")

    folder = run.root / "prune-reverse-2"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"drop": [2]}))
    write("probe", [2.0, 1.0, 50.0, 1.0, 1.0], 1.0)
    write("shift-reverse-2", [1.0, 2.0, 2.0, 2.0], 1.0)
    found = tail_shift(run, None)
    # before: 1 + 1 + 1 + 1 of 4 + 1 + 1 + 1 + 1, the removed block left out; after: 4 + 4 + 4 + 1 of 14
    assert found.value == pytest.approx(13 / 14 - 4 / 8)
    assert found.interval() == pytest.approx((found.value, found.value))
    with pytest.raises(MissingData):
        tail_shift(run, "random-2")
