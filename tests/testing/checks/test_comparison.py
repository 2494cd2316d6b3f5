"""The checks that compare the two norms pass, and notice a wrong layer or criterion."""

import pytest

from preln.testing.checks import comparison
from preln.testing.checks.comparison import PROPERTIES


@pytest.mark.parametrize("id", PROPERTIES)
def test_passes(id):
    found = PROPERTIES[id](1)
    assert found and all(e.kind == "property" and e.passed and e.detail["n"] > 0 for e in found), found


@pytest.mark.parametrize("id", ["CMP-SAME", "CMP-LT1"])
def test_notices_layers_that_are_swapped(id, monkeypatch):
    honest = comparison.dense_norm_sigma
    other = {"rms_norm": "layer_norm", "layer_norm": "rms_norm"}
    monkeypatch.setattr(comparison, "dense_norm_sigma", lambda kind, x, eps: honest(other[kind], x, eps))
    assert not all(e.passed for e in PROPERTIES[id](1))


@pytest.mark.parametrize(("factor", "notices"), [(0.9, 0), (1.1, 1)])
def test_notices_that_the_constant_is_not_sharp(factor, notices, monkeypatch):
    """The comparison fails below the constant, and must not already hold there."""
    honest = comparison.dense_norm_sigma
    monkeypatch.setattr(
        comparison,
        "dense_norm_sigma",
        lambda kind, x, eps: honest(kind, x, eps) * (factor if kind == "layer_norm" else 1),
    )
    assert [e.outcome for e in PROPERTIES["CMP-PAPER-LATE"](1)][notices] == "fail"


@pytest.mark.parametrize(("factor", "notices"), [(1.01, 0), (0.99, 1)])
def test_notices_a_threshold_that_is_off(factor, notices, monkeypatch):
    """Exact where the largest gains are tied: a hair on either side of 1 is seen."""
    honest = comparison.dense_sigma
    monkeypatch.setattr(comparison, "dense_sigma", lambda m: factor * honest(m))
    assert [e.outcome for e in PROPERTIES["CMP-LT1-GAIN-SCALED"](1)][notices] == "fail"
