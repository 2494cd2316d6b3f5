"""Every statistic against a hand-made table whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from preln.experiment.sections import Pruning
from preln.experiment.statistics.damage import (
    last_block,
    predicts_first_order,
    reverse_raw,
)
from preln.experiment.statistics.decisions import Measured, as_row, spearman, status
from preln.experiment.statistics.depth import (
    hidden_attenuation,
    norm_sigma,
    param_attenuation,
    variance_share,
)
from preln.experiment.statistics.losses import damages
from preln.experiment.statistics.registry import STATISTICS

N = 6


@pytest.mark.parametrize(
    ("interval", "threshold", "direction", "expected"),
    [
        ((-1.0, -0.6), -0.5, "below", "supported"),
        ((-1.0, -0.4), -0.5, "below", "inconclusive"),
        ((-0.4, 0.1), -0.5, "below", "unsupported"),
        ((0.6, 0.9), 0.5, "above", "supported"),
        ((0.1, 0.4), 0.5, "above", "unsupported"),
        ((0.4, 0.6), 0.5, "above", "inconclusive"),
        ((0.0, 0.0), 0.0, "below", "supported"),
        (None, 0.0, "below", "inconclusive"),
    ],
)
def test_the_whole_interval_decides(interval, threshold, direction, expected):
    assert status(interval, threshold, direction) == expected


def test_spearman_equals_scipy_also_with_ties():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_no_interval_is_inconclusive_and_no_data_untested():
    claim = {"id": "X", "statement": "s", "source": "own"}
    rule = {"statistic": "a", "meaning": "b", "threshold": 0.0, "direction": "below"}
    alone = Measured(1.0, np.array([]), 1)
    assert as_row(alone, claim=claim, rule=rule)["status"] == "inconclusive"
    assert as_row(None, claim=claim, rule=rule, missing="why")["status"] == "untested"


class Run:
    """A stand-in for the lab: a folder of tables."""

    def __init__(self, root):
        self.root = root
        prune = Pruning(metrics=("reverse", "block_influence", "random"), drop=(2,))
        self.study = SimpleNamespace(seed=0, prune=prune)

    def path(self, step, file):
        return self.root / step / file

    def result(self, step):
        return json.loads((self.root / step / "result.json").read_text())

    def probe(self, measure, values, site="block"):
        """values: one per layer; sequences differ by a few per cent around them."""
        path = self.path("probe", "sequences.parquet")
        path.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(1)
        rows = [
            (measure, layer, site, "mean", s, v * (1 + 0.02 * rng.standard_normal()))
            for layer, v in enumerate(values)
            for s in range(N)
        ]
        new = pd.DataFrame(rows, columns=["measure", "layer", "site", "statistic", "sequence", "value"])
        old = [pd.read_parquet(path)] if path.exists() else []
        pd.concat([*old, new]).to_parquet(path)
        return self

    def losses(self, step, values):
        folder = self.root / step
        folder.mkdir(exist_ok=True)
        frame = pd.DataFrame({"sequence": range(N), "loss": values, "tokens": 31})
        frame.to_parquet(folder / "sequences.parquet")

    def damage(self, deltas):
        (self.root / "damage").mkdir(exist_ok=True)
        rng = np.random.default_rng(2)
        base = 3 + 0.1 * rng.standard_normal(N)
        rows = [(-1, s, base[s], 31) for s in range(N)]
        rows += [
            (k, s, base[s] + d + 0.01 * rng.standard_normal(), 31)
            for k, d in enumerate(deltas)
            for s in range(N)
        ]
        table = pd.DataFrame(rows, columns=["layer", "sequence", "loss", "tokens"])
        table.to_parquet(self.path("damage", "sequences.parquet"))
        return table


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_hidden_attenuation_falls_and_rises(tmp_path):
    falling = hidden_attenuation(Run(tmp_path).probe("grad_hidden", [8, 4, 2, 1, 0.5]))
    assert falling.value == -1.0
    assert falling.interval() == (-1.0, -1.0)
    (tmp_path / "up").mkdir()
    assert hidden_attenuation(Run(tmp_path / "up").probe("grad_hidden", [1, 2, 3, 4])).value == 1.0


def test_param_attenuation_reads_the_stored_resamples(run):
    norms = np.array([9.0, 5.0, 1.0, 3.0, 7.0])
    folder = run.root / "probe"
    folder.mkdir()
    columns = {"measure": "grad_param", "layer": range(5), "site": "block", "value": norms, "n": N}
    # a group of weights is no block
    layers = pd.concat([pd.DataFrame(columns), pd.DataFrame(columns | {"site": "q", "value": norms[::-1]})])
    layers.to_parquet(folder / "layers.parquet")
    draws = [("block", layer, d, norms[layer] * (1 + 0.001 * d)) for layer in range(5) for d in range(4)]
    draws += [("head", 5, d, 100.0) for d in range(4)]  # no block either
    pd.DataFrame(draws, columns=["site", "layer", "draw", "value"]).to_parquet(folder / "resamples.parquet")
    found = param_attenuation(run)
    assert found.value == pytest.approx(spearman(norms, range(5)))
    assert "without the last two blocks the correlation is -1.000" in found.note


def test_sigma_and_variance_look_at_the_worst_norm(run):
    run.probe("variance_le_one", [0.5, 0.0], "attention").probe("variance_le_one", [0.0, 0.0], "mlp")
    run.probe("norm_sigma", [0.2, 3.0], "attention").probe("norm_sigma_no_gain", [0.1, 0.5], "attention")
    share = variance_share(run)
    assert share.value == pytest.approx(0.5, rel=0.05)
    assert "attention norm of block 0; 1 of 4 norms" in share.note
    sigma = norm_sigma(run)
    assert sigma.value == pytest.approx(3.0, rel=0.05)
    assert "1 of 2 norms with the learned gain, 0 without" in sigma.note


def test_reverse_raw_compares_with_the_best_other_metric_in_pairs(run):
    hard = np.linspace(0, 5, N)  # sequences differ far more than metrics do
    run.losses("prune-reverse-2", 4.0 + hard)
    run.losses("prune-block_influence-2", 3.9 + hard)
    run.losses("prune-random-2", 6.0 + hard)
    found = reverse_raw(run)
    assert found.value == pytest.approx(0.1)
    assert status(found.interval(), 0.0, "below") == "unsupported"
    run.losses("prune-reverse-2", 3.8 + hard)
    assert status(reverse_raw(run).interval(), 0.0, "below") == "supported"


def test_last_block_is_compared_with_the_deeper_half_only(run):
    run.damage([9.0, 0.3, 0.1, 0.2, 0.5])
    found = last_block(run)
    assert found.value == pytest.approx(0.3, abs=0.05)
    assert status(found.interval(), 0.0, "above") == "supported"


def test_damage_table_equals_direct_means(run):
    table = run.damage([0.4, 0.1])
    found = damages(table, seed=0)
    direct = table.groupby("layer")["loss"].mean()
    assert np.allclose(found["loss"], direct.loc[[0, 1]])
    assert np.allclose(found["delta"], direct.loc[[0, 1]] - direct.loc[-1])
    assert (found["low"] < found["delta"]).all()
    assert (found["delta"] < found["high"]).all()


def test_prediction_correlates_two_independent_tables(run):
    run.damage([0.5, 0.1, 0.2, 0.3])
    run.probe("first_order_damage", [5.0, 1.0, 2.0, 3.0]).probe("grad_hidden", [5.0, 4.0, 3.0, 2.0, 1.0])
    found = predicts_first_order(run)
    assert found.value == 1.0
    assert "0.200" in found.note  # gradients 4, 3, 2, 1 against damages .5, .1, .2, .3


def test_every_statistic_has_a_meaning_in_words():
    for statistics in STATISTICS.values():
        for found in statistics.values():
            assert found.function.__doc__
            assert len(found.meaning) > 20
