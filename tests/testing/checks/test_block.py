"""The checks of single blocks pass, and notice wrong formulas and bounds."""

import functools

import pytest
import torch

from preln.testing.checks import block, branches
from preln.testing.checks.block import PROPERTIES
from preln.testing.layers import NormLayer

PLACES = {
    "BLK-PRE": "pre",
    "BLK-PARALLEL": "parallel",
    "BLK-POST": "post",
    "BLK-SANDWICH": "sandwich",
    "BLK-AFTER": "after",
}
FORMULA, BOUNDED, SHARP = range(3)


def outcomes(id, rounds=2):
    return [e.outcome for e in PROPERTIES[id](rounds)]


def twist(monkeypatch, id, change):
    """Change what a placement says about its Jacobian."""
    honest = getattr(block, PLACES[id])

    @functools.wraps(honest)
    def twisted(draw):
        placed = honest(draw)
        return placed._replace(**change(placed))

    monkeypatch.setattr(block, PLACES[id], twisted)


@pytest.mark.parametrize("id", PROPERTIES)
def test_passes(id):
    found = PROPERTIES[id](2)
    assert len(found) >= 3 and all(e.kind == "property" and e.passed for e in found), found
    assert all(e.detail["n"] > 0 for e in found)


@pytest.mark.parametrize("id", PLACES)
@pytest.mark.parametrize(
    ("change", "notices"),
    [
        (lambda p: {"formula": p.formula * (1 + 1e-6)}, FORMULA),
        (lambda p: {"formula": p.formula.mT}, FORMULA),
        (lambda p: {"upper": p.upper / 4}, BOUNDED),
        (lambda p: {"upper": p.upper * (1 + 1e-6)}, SHARP),
    ],
    ids=[
        "formula",
        "transposed",
        "upper too small",
        "upper not sharp",
    ],
)
def test_notices(id, change, notices, monkeypatch):
    twist(monkeypatch, id, change)
    assert outcomes(id)[notices] == "fail"


@pytest.mark.parametrize("id", [id for id in PLACES if id != "BLK-POST"])
@pytest.mark.parametrize(
    ("bound", "factor", "notices"),
    [("lower", 0.999, SHARP), ("lower", 30.0, BOUNDED), ("change", 1.001, SHARP), ("change", 0.1, BOUNDED)],
)
def test_notices_other_wrong_bounds(id, bound, factor, notices, monkeypatch):
    twist(monkeypatch, id, lambda p: {bound: getattr(p, bound) * factor})
    assert outcomes(id)[notices] == "fail"


@pytest.mark.parametrize("id", PROPERTIES)
def test_notices_a_norm_jacobian_without_eps(id, monkeypatch):
    honest = NormLayer.jacobian
    monkeypatch.setattr(
        NormLayer, "jacobian", lambda self, x: honest(NormLayer(self.kind, 1e-12, self.weight), x)
    )
    assert outcomes(id)[FORMULA] == "fail"


def test_notices_pieces_in_the_wrong_order(monkeypatch):
    """G A for A G."""
    honest = branches.part

    def swapped(*args):
        p = honest(*args)
        return p._replace(branch=p.norm, norm=p.branch)

    monkeypatch.setattr(branches, "part", swapped)
    assert outcomes("BLK-PRE")[FORMULA] == "fail"
    assert outcomes("BLK-PARALLEL")[FORMULA] == "fail"


def test_the_bounds_of_the_lost_directions_can_fail(monkeypatch):
    """Post-LN: without centring nothing is lost; with another denominator the radial bound is wrong."""
    names = ["bare", "lost", "radial", "sharp"]
    honest = NormLayer.denominator
    monkeypatch.setattr(NormLayer, "denominator", lambda self, x: 1.1 * honest(self, x))
    assert dict(zip(names, outcomes("BLK-POST")[3:], strict=True)) == {
        "bare": "pass",
        "lost": "pass",
        "radial": "fail",
        "sharp": "fail",
    }
    monkeypatch.undo()
    call = NormLayer.__call__
    scaled = lambda self, x: call(NormLayer("rms_norm", self.eps, self.weight), x)  # noqa: E731
    monkeypatch.setattr(NormLayer, "__call__", scaled)
    assert dict(zip(names, outcomes("BLK-POST")[3:], strict=True))["lost"] == "fail"
    assert dict(zip(names, outcomes("BLK-POST")[3:], strict=True))["bare"] == "fail"


def test_the_size_of_the_sandwich_can_fail(monkeypatch):
    call = NormLayer.__call__
    monkeypatch.setattr(NormLayer, "__call__", lambda self, x: 3 * call(self, x))
    *_, size, sharp = outcomes("BLK-SANDWICH")
    assert (size, sharp) == ("fail", "fail")


def test_the_shared_norm_can_fail(monkeypatch):
    honest = block.pre_norm_part
    monkeypatch.setattr(
        block,
        "pre_norm_part",
        lambda block, x: (p := honest(block, x))._replace(branch=p.branch / 9),
    )
    assert outcomes("BLK-PARALLEL")[-1] == "fail"


def test_tokens_notice_sums_and_means_for_the_largest(monkeypatch):
    honest = NormLayer.sigma
    monkeypatch.setattr(NormLayer, "sigma", lambda self, x: honest(self, x).mean(-1, keepdim=True))
    assert outcomes("BLK-TOKENS")[1:] == ["fail", "fail"]
    assert outcomes("BLK-TOKENS")[0] == "pass"


def test_sequences_mix_tokens_as_they_should():
    """Attention is causal; the norm's Jacobian is block-diagonal and equals autograd's."""
    draw = next(branches.draws(seed=0, rounds=1))
    jacobian = branches.sequence_jacobian(draw.attention, draw.x).unflatten(-1, (3, 4)).unflatten(1, (3, 4))
    size = jacobian.abs().amax((2, 4))
    assert (size.triu(1) == 0).all() and (size.tril() > 0).any(0).equal(torch.ones(3, 3).tril().bool())
    whole = branches.sequence_jacobian(draw.first, draw.x)
    assert (whole - branches.over_tokens(draw.first.jacobian(draw.x))).abs().max() < 1e-9 * whole.abs().max()
