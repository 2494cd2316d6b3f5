"""Hunting the worst error and turning checks into evidence."""

import json

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.testing import NormLayer, autograd_jacobian, norm_inputs
from preln.testing.hunt import check_property, hunt, norm_module_evidence, plain

REALS = st.floats(-100.0, 100.0)


def test_the_worst_error_is_the_largest_seen():
    seen = []

    def error(a, b):
        seen.append((abs(a - b) / 1000, [a, b]))
        return seen[-1][0]

    found = hunt(error, REALS, REALS, examples=60, against="a against b", tolerance=1.0)
    largest, where = max(seen)
    assert found.kind == "property" and found.passed and found.detail["found_by"] == "hypothesis target()"
    assert found.detail["n"] == len(seen) == 60
    assert found.detail["largest_relative_error"] == largest
    assert max(abs(a - b) / 1000 for a, b in [found.detail["worst_input"]["drawn"]]) == largest, where


def test_target_climbs_higher_than_chance():
    """The error is largest at one corner, which random draws do not reach."""
    narrow = st.integers(0, 10**9)
    found = hunt(lambda n: n / 10**9, narrow, examples=400, against="climb", tolerance=1.0)
    assert found.detail["largest_relative_error"] > 0.999


def test_the_same_seed_finds_the_same():
    one, two, other = (
        hunt(lambda x: float(x.abs().sum()), norm_inputs(), examples=20, against="", tolerance=1.0, start=k)
        for k in (1, 1, 2)
    )
    assert one.detail == two.detail != other.detail


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0])
def test_bad_errors_fail(value):
    found = hunt(lambda x: value if x > 0 else 0.0, REALS, examples=50, against="", tolerance=1.0)
    assert not found.passed
    assert (found.detail["largest_relative_error"] is None) == (value != 2.0)
    assert found.detail["worst_input"]["drawn"][0] > 0
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_wrong_formula_is_found():
    """Negative control: RMSNorm's Jacobian with eps outside the root, against torch's layer."""
    inside, outside = (NormLayer(kind, 0.5) for kind in ("rms_norm", "rms_norm_outside"))

    def error(x):
        return float((autograd_jacobian(inside, x) - outside.jacobian(x)).abs().max())

    def check(x):
        assert error(x) <= 1e-9, "the Jacobians differ"

    assert not hunt(error, norm_inputs(), examples=50, against="", tolerance=1e-9).passed
    found = check_property(check, norm_inputs(), against="Jacobians")
    assert found.kind == "counterexample" and found.passed
    assert found.detail["message"].startswith("the Jacobians differ") and found.detail["check"] == "Jacobians"
    # Shrunk to one coordinate.
    assert len(found.detail["instance"]["drawn"][0]) == 1
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_check_that_holds_is_property_evidence():
    found = check_property(lambda a, b: None, REALS, REALS, examples=30, against="nothing")
    assert found.kind == "property" and found.passed and found.detail["n"] == 30

    def positive(a):
        assume(a > 0)

    assert 0 < check_property(positive, REALS, examples=30, against="").detail["n"] <= 30


def test_counterexamples_are_shrunk_and_named():
    def small(case):
        assert case["n"] < 17

    cases = st.fixed_dictionaries({"n": st.integers(0, 10**6)})
    assert check_property(small, cases, against="").detail["instance"] == {"n": 17}


def test_other_errors_and_no_examples_do_not_pass():
    def broken(a):
        assert a < 10
        if a < 5:
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        check_property(broken, REALS, against="")
    with pytest.raises(KeyError, match="broken"):
        hunt(broken, st.floats(-100.0, 1.0), examples=5, against="", tolerance=1.0)
    with pytest.raises(InputError, match="examples is 0"):
        check_property(abs, REALS, examples=0, against="")
    with pytest.raises(InputError, match="examples is 0"):
        hunt(abs, REALS, examples=0, against="", tolerance=1.0)
    with pytest.raises(Exception, match=r"[Uu]nable to satisfy|no example"):
        check_property(lambda a: assume(False), REALS, examples=5, against="")


def test_plain_data():
    layer = NormLayer("rms_norm", 0.5, torch.tensor([1.0, float("inf")]))
    assert plain((layer, {1: [True, None, "a"]})) == [
        {"kind": "rms_norm", "eps": 0.5, "weight": [1.0, "inf"]},
        {"1": [True, None, "a"]},
    ]
    assert isinstance(plain(object()), str)


def test_modules_are_hunted_and_a_missing_package_gives_no_evidence(monkeypatch):
    names = ("LlamaRMSNorm", "torch.nn.LayerNorm")
    both = norm_module_evidence(names, 20)
    assert [e.passed for e in both] == [True, True] and all(e.detail["n"] == 20 for e in both)
    assert set(both[0].detail["worst_input"]) == {"weight", "eps", "x"}
    assert 1e-9 < both[0].detail["largest_relative_error"] <= 1e-5 == both[0].detail["tolerance"]

    def missing(module, *, extra):
        from preln.base.errors import MissingExtraError

        raise MissingExtraError(module)

    monkeypatch.setattr("preln.testing.modules.require", missing)
    assert len(norm_module_evidence(names, 1)) == 1
