"""The checks of stacks and of growth pass, and notice wrong products, bounds and rates."""

import math

import pytest
import torch

from preln.testing.checks import depth, growth
from preln.testing.checks.depth import PROPERTIES

STACKS = ("STK-UPPER", "STK-LOWER", "STK-TAIL")


def outcomes(id, rounds=2):
    return [e.outcome for e in PROPERTIES[id](rounds)]


@pytest.mark.parametrize("id", PROPERTIES)
def test_passes(id):
    found = PROPERTIES[id](2)
    assert found and all(e.kind == "property" and e.passed and e.detail["n"] > 0 for e in found), found


@pytest.mark.parametrize("id", STACKS)
@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_bounds_notice_smaller_branches(id, factor, monkeypatch):
    """a_k g_k taken too small: every bound is broken."""
    honest = depth.products
    monkeypatch.setattr(
        depth,
        "products",
        lambda **k: (p._replace(steps=factor * p.steps) for p in honest(**k)),
    )
    assert outcomes(id)[0] == "fail"


@pytest.mark.parametrize("id", STACKS)
def test_sharpness_notices_another_stack(id, monkeypatch):
    honest = depth.multiples
    monkeypatch.setattr(depth, "multiples", lambda rounds: ((m, 1.01 * c) for m, c in honest(rounds)))
    assert outcomes(id)[-1] == "fail"


def test_the_exponential_bound_can_fail(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "log1p", lambda x: x + 0.1 * x.square())
    assert outcomes("STK-TAIL")[1] == "fail"


def test_chain_notices_the_reversed_order(monkeypatch):
    """J_{l+1} ... J_{L-1} for J_{L-1} ... J_{l+1}."""
    honest = depth.pull_back
    monkeypatch.setattr(depth, "pull_back", lambda row, factors: honest(row, factors[::-1]))
    assert outcomes("STK-CHAIN") == ["fail"]


def test_chain_notices_a_transposed_factor(monkeypatch):
    honest = depth._block_jacobian
    monkeypatch.setattr(depth, "_block_jacobian", lambda block, x: honest(block, x).mT)
    assert outcomes("STK-CHAIN") == ["fail"]


def test_bound_by_depth_notices_wrong_gains(monkeypatch):
    honest = depth.pre_norm_part
    monkeypatch.setattr(depth, "pre_norm_part", lambda b, x: (p := honest(b, x))._replace(a=0.01 * p.a))
    assert outcomes("STK-BOUND-MONOTONE") == ["pass", "fail", "fail"]
    monkeypatch.setattr(depth, "pre_norm_part", lambda b, x: (p := honest(b, x))._replace(a=-0.1 * p.a))
    assert outcomes("STK-BOUND-MONOTONE")[0] == "fail"


def test_monotone_form_notices_a_wrong_sigma(monkeypatch):
    honest = depth.smallest
    monkeypatch.setattr(depth, "smallest", lambda m: 1.001 * honest(m))
    assert outcomes("STK-GRADIENT-MONOTONE-PSD") == ["pass", "fail"]
    monkeypatch.setattr(torch.Tensor, "mT", property(lambda m: m))
    assert outcomes("STK-GRADIENT-MONOTONE-PSD")[0] == "fail"


@pytest.mark.parametrize("id", growth.PROPERTIES)
def test_growth_passes(id):
    found = growth.PROPERTIES[id](2)
    assert found and all(e.kind == "property" and e.passed and e.detail["n"] > 0 for e in found), found


def test_growth_notices_correlated_branches(monkeypatch):
    """All signs alike: the stream grows linearly."""
    honest = torch.cartesian_prod
    monkeypatch.setattr(torch, "cartesian_prod", lambda *a: honest(*a).abs())
    assert growth.stk_growth(1)[0].outcome == "fail"


@pytest.mark.parametrize(
    ("name", "wrong", "notices"),
    [
        ("sqrt", lambda x: 0.999 * math.sqrt(x), (1, 2)),
        ("log", lambda x: math.log(x) + 0.01, (3, 5)),
        ("log", lambda x: math.log(x) - 0.1, (3, 4, 5)),
    ],
)
def test_growth_notices_wrong_rates(name, wrong, notices, monkeypatch):
    monkeypatch.setattr(growth, name, wrong)
    found = [e.outcome for e in growth.stk_growth(1)]
    assert all(found[k] == "fail" for k in notices), found


def test_initialisation_notices_a_missing_relu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "relu", lambda x: x)
    assert [e.outcome for e in growth.stk_init(2)] == ["fail", "pass", "fail"]


def test_initialisation_notices_another_variance(monkeypatch):
    honest = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: honest(*a, **k) * 1.1)
    assert [e.outcome for e in growth.stk_init(4)] == ["fail", "fail", "fail"]


def test_last_norm_notices_a_mean_that_is_taken_out_twice(monkeypatch):
    """(3/2)(1 - 1/d) for 3/2 - 1/(2d): what comes out of a norm has no mean left to lose."""
    monkeypatch.setattr(growth, "last_variance", lambda d: 1.5 * (1 - 1 / d))
    assert [e.outcome for e in growth.stk_init(12)] == ["pass", "pass", "fail"]
