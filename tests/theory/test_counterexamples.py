"""Every refuted claim's counterexample again, in plain numpy, from the numbers in `ledger.json` alone."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from preln.theory import decide, registry

REFUTED = sorted(id for id, c in registry().items() if c.expect == "refuted")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    decide(REFUTED).write(path)
    return {claim["id"]: claim for claim in json.loads(path.read_text())["claims"]}


def number(text):
    return float(Fraction(text))


def numbers(values):
    return np.array([numbers(v) if isinstance(v, list) else number(v) for v in values])


def examples(written, id):
    assert written[id]["status"] == "refuted"
    found = [e["detail"] for e in written[id]["evidence"] if e["kind"] == "counterexample"]
    assert found
    for detail in found:
        yield detail["instance"], detail["values"]


def norm(layer, x, e):
    if layer == "layer_norm":
        x = x - x.mean()
    square = (x * x).mean()
    return x / (math.sqrt(square) + e if layer == "rms_norm_outside" else math.sqrt(square + e))


def jacobian(instance, layer=None):
    """Central differences with one Richardson step: error about h^4."""
    x, e, kind = numbers(instance["x"]), number(instance["eps"]), layer or instance["layer"]

    def slope(h):
        columns = [(norm(kind, x + h * u, e) - norm(kind, x - h * u, e)) / (2 * h) for u in np.eye(len(x))]
        return np.stack(columns, axis=1)

    gain = numbers(instance["weight"]) if "weight" in instance else np.ones(len(x))
    return gain[:, None] * (4 * slope(1e-3) - slope(2e-3)) / 3


def sigma(instance, layer=None):
    return np.linalg.norm(jacobian(instance, layer), 2)


def test_every_refuted_claim_is_reproduced_below():
    covered = {"LN-NORM", "RMS-PAPER-MODELS", "CMP-PAPER", "CMP-SAME-LOWD", "STK-GRADIENT-MONOTONE"}
    assert set(REFUTED) == covered | {"CMP-LT1-GAIN", "STK-LOWER-RAW", "PRN-TELESCOPE-ANY", "SIM-SUM"}


@pytest.mark.parametrize("id", ["LN-NORM", "RMS-PAPER-MODELS"])
def test_a_false_formula(written, id):
    for instance, values in examples(written, id):
        x, e = numbers(instance["x"]), number(instance["eps"])
        formula = {
            "LN-NORM": 1 / math.sqrt(x.var() + e),
            "RMS-PAPER-MODELS": 1 / (math.sqrt((x * x).mean()) + e),
        }[id]
        assert sigma(instance) == pytest.approx(number(values["sigma"]), abs=1e-7)
        assert formula == pytest.approx(number(values["claimed"]), rel=1e-14)
        assert abs(sigma(instance) - formula) > 0.1


@pytest.mark.parametrize("id", ["CMP-PAPER", "CMP-SAME-LOWD"])
def test_a_false_comparison(written, id):
    for instance, values in examples(written, id):
        left, right = (sigma(instance, layer) for layer in instance["layers"])
        assert left == pytest.approx(number(values["sigma_rms"]), rel=1e-5)
        assert right == pytest.approx(number(values["sigma_ln"]), rel=1e-5)
        assert left > right + 0.1


def test_a_gain_that_lifts_sigma_above_1(written):
    for instance, values in examples(written, "CMP-LT1-GAIN"):
        assert (
            numbers(instance["x"]).var() == pytest.approx(number(values["var"])) and number(values["var"]) > 1
        )
        assert sigma(instance) == pytest.approx(number(values["sigma"]), rel=1e-6)
        assert sigma(instance) > 1.1
        assert sigma({k: v for k, v in instance.items() if k != "weight"}) < 1


def block(instance):
    return np.eye(len(instance["x"])) + numbers(instance["branch"]) @ jacobian(instance)


def test_a_growing_gradient(written):
    for instance, values in examples(written, "STK-GRADIENT-MONOTONE"):
        upstream = numbers(instance["upstream"])
        before, after = np.linalg.norm(block(instance).T @ upstream), np.linalg.norm(upstream)
        assert before == pytest.approx(number(values["gradient_norm_before"]), rel=1e-5)
        assert before < after == number(values["gradient_norm_after"])


def test_a_product_below_its_lower_bound(written):
    for instance, values in examples(written, "STK-LOWER-RAW"):
        size = np.linalg.norm(numbers(instance["branch"]), 2) * sigma(instance)
        smallest = np.linalg.svd(np.linalg.matrix_power(block(instance), instance["blocks"]))[1][-1]
        assert (1 - size) ** instance["blocks"] == pytest.approx(number(values["claimed"]), rel=1e-5)
        assert smallest == pytest.approx(number(values["smallest"]), abs=1e-7)
        assert smallest < number(values["claimed"]) - 0.5


def test_a_dropped_block_that_takes_a_later_update_along(written):
    for instance, values in examples(written, "PRN-TELESCOPE-ANY"):
        (x,), weights = numbers(instance["x"]), numbers(instance["weights"])
        whole = x * np.prod(1 + weights)
        cut = x * np.prod([1 + w for k, w in enumerate(weights) if k not in instance["dropped"]])
        before = [x * np.prod(1 + weights[:k]) for k in instance["dropped"]]
        claimed = whole - sum(weights[k] * b for k, b in zip(instance["dropped"], before, strict=True))
        assert (whole, cut, claimed) == tuple(number(values[k]) for k in ("whole", "cut", "claimed"))
        assert cut != claimed


def test_two_rules_that_pick_different_blocks(written):
    for instance, values in examples(written, "SIM-SUM"):
        states, size = [numbers(s) for s in instance["states"]], instance["size"]

        def angular(a, b):
            return math.acos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)) / math.pi

        starts = range(len(states) - size)
        sums = [sum(angular(states[s + k], states[s + k + 1]) for k in range(size)) for s in starts]
        across = [angular(states[s], states[s + size]) for s in starts]
        assert sums == pytest.approx(list(numbers(values["sums"])))
        assert across == pytest.approx(list(numbers(values["across"])))
        assert int(np.argmin(sums)) == values["by_sum"] != values["by_across"] == int(np.argmin(across))
