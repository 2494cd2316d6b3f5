"""What `preln verify` runs: proofs plus checks on numbers, and that a failing check is seen."""

import json

import pytest
import torch

from preln.base.errors import InputError
from preln.testing import norm_properties, other_properties
from preln.testing.norm_properties import PROPERTIES as NORMS
from preln.testing.other_properties import PROPERTIES as OTHERS
from preln.testing.properties import Worst
from preln.testing.verify import properties, verify
from preln.theory import Evidence, registry


def test_quick_verification_holds_and_is_written(tmp_path):
    ledger = verify(["RMS-NORM", "LN-NORM", "STK-GRADIENT-MONOTONE"])
    assert ledger.ok and list(ledger.claims) == ["RMS-NORM", "LN-NORM", "STK-GRADIENT-MONOTONE"]
    for entry in ledger.claims.values():
        (*_, last) = entry.evidence
        assert last.kind == "property" and last.passed and last.detail["n"] > 0
        assert (
            last.detail["largest_relative_error"] <= last.detail["tolerance"]
            and last.detail["worst_input"]["x"]
        )
    ledger.write(tmp_path / "ledger.json")
    assert json.loads((tmp_path / "ledger.json").read_text()) == ledger.to_json()


def test_every_proved_theorem_has_a_check():
    proved = {id for id, c in registry().items() if c.kind == "theorem" and c.expect == "proved"}
    assert set(NORMS) | set(OTHERS) == proved
    assert not set(NORMS) & set(OTHERS)


@pytest.mark.parametrize("id", sorted(set(NORMS) | set(OTHERS)))
def test_each_check_passes(id):
    found = properties(id, [], 1)
    assert found and all(e.kind == "property" and e.passed for e in found), found


def test_a_failing_check_shows(monkeypatch):
    """Negative control: RMSNorm's formula with eps outside, tested against torch's layer."""
    from preln import closed_form as cf

    right = cf.rms_norm_jacobian
    monkeypatch.setattr(
        cf, "rms_norm_jacobian", lambda x, w=None, *, eps, **_: right(x, w, eps=eps, eps_placement="outside")
    )
    ledger = verify(["RMS-JAC"])
    entry = ledger.claims["RMS-JAC"]
    assert not ledger.ok and entry.status == "open" and "RMS-JAC" in ledger.failures[0]
    assert [e.outcome for e in entry.evidence if e.kind == "property"] == ["fail", "fail"]


@pytest.mark.parametrize("id", sorted(NORMS))
def test_norm_checks_notice_a_wrong_layer(id, monkeypatch):
    """Negative control: the layer under test has twice the eps it says."""
    from dataclasses import replace

    honest = norm_properties.autograd_jacobian

    def twisted(layer, x):
        if isinstance(layer, torch.nn.Module):
            return honest(layer, x)
        return honest(replace(layer, eps=2 * layer.eps), x)

    monkeypatch.setattr(norm_properties, "autograd_jacobian", twisted)
    assert not all(e.passed for e in properties(id, [], 1))


def test_reproducing_notices_wrong_values():
    detail = {
        "instance": {"layer": "layer_norm", "x": ["1", "-1"], "eps": "9/16"},
        "values": {"sigma": "36/125"},
    }
    assert other_properties.reproduce(detail, "LN-NORM").passed
    assert not other_properties.reproduce(detail | {"values": {"sigma": "4/5"}}, "LN-NORM").passed


def test_worst_keeps_the_largest_and_refuses_nothing():
    worst = Worst("a against b", 0.5)
    assert not worst.evidence().passed
    worst.update(torch.tensor([0.1, 0.4]), torch.tensor([[1.0], [2.0]]), eps=0.1)
    assert worst.evidence().passed and worst.input == {"x": [2.0], "eps": 0.1}
    worst.update(torch.tensor([float("nan")]), torch.tensor([[3.0]]))
    assert not worst.evidence().passed and worst.evidence().detail["largest_relative_error"] is None
    assert isinstance(worst.evidence(), Evidence)


def test_unknown_ids_and_profiles_are_named():
    with pytest.raises(InputError, match=r"NO-SUCH.*RMS-JAC"):
        verify(["NO-SUCH"])
    with pytest.raises(InputError, match="slow"):
        verify(["RMS-JAC"], profile="slow")
