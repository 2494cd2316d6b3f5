"""What `preln verify` runs: proofs plus checks on numbers, and that a failing check is seen."""

import json

import pytest
import torch

from preln.base.errors import InputError
from preln.testing.checks import checks, in_use, measurements, mutants, norm, variant
from preln.testing.checks.norm import PROPERTIES as NORMS
from preln.testing.checks.reproduce import REPRODUCE, reproduce
from preln.testing.modules import NORM_MODULES
from preln.testing.properties import Worst
from preln.testing.verify import properties, verify
from preln.theory import Evidence, Ledger, decide, registry


def test_quick_verification_holds_and_is_written(tmp_path):
    ledger = verify(["RMS-NORM", "LN-NORM", "STK-GRADIENT-MONOTONE"])
    assert ledger.ok and list(ledger.claims) == ["RMS-NORM", "LN-NORM", "STK-GRADIENT-MONOTONE"]
    for entry in ledger.claims.values():
        (*_, last) = entry.evidence
        assert last.kind == "property" and last.passed and last.detail["n"] > 0
        numbers = [e.detail for e in entry.evidence if "largest_relative_error" in e.detail]
        assert numbers and all(
            d["largest_relative_error"] <= d["tolerance"] and d["worst_input"] for d in numbers
        )
    ledger.write(tmp_path / "ledger.json")
    assert json.loads((tmp_path / "ledger.json").read_text()) == ledger.to_json()


def test_every_theorem_is_put_to_numbers():
    theorems = {id: c for id, c in registry().items() if c.kind == "theorem"}
    assert set(checks()) == {id for id, c in theorems.items() if c.expect == "proved"}
    assert set(REPRODUCE) == {id for id, c in theorems.items() if c.expect == "refuted"}
    assert set(measurements()) == {"STK-INIT", "STK-GROWTH"}


@pytest.mark.parametrize("id", sorted(NORMS | variant.PROPERTIES))
def test_each_check_passes(id):
    found = properties(id, [], 1)
    assert found and all(e.kind == "property" and e.passed for e in found), found


def test_every_module_in_use_is_hunted_once():
    found = [e for id in ("RMS-GAIN", "LN-GAIN") for e in in_use(id, 1)]
    found += [e for id in ("VAR-ONE-PLUS", "VAR-HEADS") for e in variant.PROPERTIES[id](1)]
    hunted = [e.detail["against"] for e in found if "found_by" in e.detail]
    for name in NORM_MODULES:
        assert sum(f"of {name}:" in line for line in hunted) == 1, name


@pytest.mark.parametrize("id", sorted(mutants.MUTATIONS))
def test_every_mutated_formula_is_noticed(id):
    (found,) = mutants.formula_mutants(id)
    assert found.passed and len(found.detail["negative_controls"]) == len(mutants.MUTATIONS[id])


def test_a_mutant_that_changes_nothing_survives(monkeypatch):
    """Negative control: the machinery can find survivors."""
    monkeypatch.setitem(mutants.MUTATIONS, "RMS-SPEC", ("gain dropped",))
    (found,) = mutants.formula_mutants("RMS-SPEC")
    assert not found.passed
    entry = decide(["RMS-SPEC"]).claims["RMS-SPEC"].with_evidence(found)
    ledger = Ledger({"RMS-SPEC": entry})
    assert entry.status == "open" and ledger.survivors() == ["RMS-SPEC: formula with gain dropped"]
    assert "MUTANT SURVIVES: RMS-SPEC: formula with gain dropped" in ledger.family_table()


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
    assert next(e.outcome for e in entry.evidence if e.kind == "property") == "fail"


@pytest.mark.parametrize("id", sorted(NORMS))
def test_norm_checks_notice_a_wrong_layer(id, monkeypatch):
    """Negative control: the layer under test has twice the eps it says."""
    from dataclasses import replace

    honest = norm.autograd_jacobian

    def twisted(layer, x):
        if isinstance(layer, torch.nn.Module):
            return honest(layer, x)
        return honest(replace(layer, eps=2 * layer.eps), x)

    monkeypatch.setattr(norm, "autograd_jacobian", twisted)
    assert not all(e.passed for e in properties(id, [], 1))


def test_reproducing_notices_wrong_values():
    detail = {
        "instance": {"layer": "layer_norm", "x": ["1", "-1"], "eps": "9/16"},
        "values": {"sigma": "36/125"},
    }
    assert reproduce("LN-NORM", detail).passed
    assert not reproduce("LN-NORM", detail | {"values": {"sigma": "4/5"}}).passed


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
