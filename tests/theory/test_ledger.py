"""The registry, the statuses, and every claim of the ledger."""

import json

import pytest
import sympy as sp

from preln.base.errors import InputError
from preln.theory import Evidence, Registry, claim, decide, registry
from preln.theory.claims import EVIDENCE_KINDS, HYPOTHESIS_STATUSES, PROOFS, THEOREM_STATUSES, status_of
from preln.theory.index import d, inner
from preln.theory.norms import RMS_FACTS, along_x, eps, ones, rms_jacobian, s, x
from preln.theory.spectrum import Eigenspace, Spectrum, Symbolic, v

REFUTED = {
    *("RMS-PAPER-MODELS", "LN-NORM", "CMP-SAME-LOWD", "CMP-PAPER", "CMP-LT1-GAIN"),
    *("STK-GRADIENT-MONOTONE", "STK-LOWER-RAW", "PRN-TELESCOPE-ANY", "SIM-SUM"),
}
PROVED = {
    *("RMS-JAC", "RMS-SPEC", "RMS-NORM", "RMS-PAPER", "RMS-EPS", "RMS-SPHERE", "RMS-GAIN-BOUND", "RMS-GAIN"),
    *("LN-JAC", "LN-SPEC", "LN-NORM-D3", "LN-GAIN-BOUND", "LN-GAIN", "CMP-SAME", "CMP-PAPER-LATE"),
    *("CMP-LT1", "CMP-LT1-GAIN-SCALED", "VAR-ONE-PLUS", "VAR-HEADS", "VAR-PLAIN"),
    *("BLK-TOKENS", "BLK-PRE", "BLK-PARALLEL", "BLK-POST", "BLK-SANDWICH", "BLK-AFTER"),
    *("STK-CHAIN", "STK-UPPER", "STK-LOWER", "STK-TAIL", "STK-BOUND-MONOTONE"),
    *("STK-GRADIENT-MONOTONE-PSD", "STK-GROWTH", "STK-INIT"),
    *("PRN-TELESCOPE", "PRN-FIRST-ORDER", "PRN-BOUND", "PRN-HEAD", "SPD-AMDAHL"),
    *("SIM-BI", "SIM-ANGLE", "SIM-TRIANGLE", "SIM-SUM-ARC", "SIM-GLOBAL"),
    *("HEAL-PARAMS", "HEAL-PREFIX", "HEAL-RANK", "HEAL-COST"),
}


@pytest.fixture(scope="module")
def written(ledger, tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "new" / "ledger.json"
    ledger.write(path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("id", sorted(PROVED | REFUTED))
def test_every_theorem_is_decided(ledger, id):
    entry = ledger.claims[id]
    assert entry.status == ("proved" if id in PROVED else "refuted")
    assert all(e.passed for e in entry.evidence)


def test_nothing_else_is_in_the_ledger(ledger):
    theorems = {id for id, entry in ledger.claims.items() if entry.claim.kind == "theorem"}
    assert theorems == PROVED | REFUTED
    hypotheses = [entry for entry in ledger.claims.values() if entry.claim.kind == "hypothesis"]
    assert len(hypotheses) == 19 and {entry.status for entry in hypotheses} == {"untested"}
    assert ledger.ok and ledger.failures == []


def test_no_proof_rests_on_fixed_dimensions(ledger):
    for id in PROVED:
        kinds = {e.kind for e in ledger.claims[id].evidence}
        assert kinds <= PROOFS and "symbolic_fixed_d" not in kinds
        for e in ledger.claims[id].evidence:
            assert e.kind != "symbolic" or e.detail["dimension"] == "every d"


def test_every_theorem_has_negative_controls_and_all_are_rejected(ledger):
    for id in PROVED | REFUTED:
        controls = [c for e in ledger.claims[id].evidence for c in e.detail.get("negative_controls", [])]
        assert controls and all(c["rejected"] for c in controls), id


def test_the_file_has_the_schema_of_the_contract(written):
    assert written["schema_version"] == 1
    ids = [c["id"] for c in written["claims"]]
    assert len(ids) == len(set(ids))
    for c in written["claims"]:
        assert set(c) == {
            "id",
            "kind",
            "family",
            "title",
            "statement",
            "assumptions",
            "uses",
            "status",
            "source",
            "evidence",
        }
        assert c["status"] in (THEOREM_STATUSES if c["kind"] == "theorem" else HYPOTHESIS_STATUSES)
        assert all(used in ids for used in c["uses"])
        for e in c["evidence"]:
            assert set(e) == {"kind", "outcome", "detail"}
            assert e["kind"] in EVIDENCE_KINDS and e["outcome"] in ("pass", "fail")


def test_refuted_claims_name_the_correction_and_the_sharp_condition(written):
    by_id = {c["id"]: c for c in written["claims"]}
    for id in REFUTED:
        for e in by_id[id]["evidence"]:
            if e["kind"] == "counterexample":
                assert e["detail"]["sharp_condition"]
                assert by_id[e["detail"]["corrected_by"]]["status"] == "proved"


# The registry and the rules for statuses.


def test_statuses_follow_from_the_evidence_alone():
    passed, failed = Evidence("symbolic", "pass"), Evidence("smt", "fail")
    fixed, example = Evidence("symbolic_fixed_d", "pass"), Evidence("counterexample", "pass")
    assert status_of("theorem", [passed], {}) == "proved"
    assert status_of("theorem", [fixed], {}) == "open"
    assert status_of("theorem", [Evidence("property", "pass")], {}) == "open"
    assert status_of("theorem", [], {}) == "open"
    assert status_of("theorem", [passed, failed], {}) == "open"
    assert status_of("theorem", [passed, example], {}) == "refuted"
    assert status_of("theorem", [passed, Evidence("counterexample", "fail")], {}) == "open"
    assert status_of("theorem", [passed], {"USED": "open"}) == "open"
    assert status_of("hypothesis", [passed], {}) == "untested"


def mine(*, fails=False, expect="proved", uses=(), id="MY-CLAIM", into=None):
    into = Registry() if into is None else into

    @claim(id, title="t", statement="s", expect=expect, uses=uses, registry=into)
    def decision():
        return [Evidence("counterexample", "pass")] if fails else [Evidence("smt", "pass")]

    return into


def test_a_ledger_says_when_a_claim_is_not_as_listed():
    assert decide(claims=mine()).ok
    wrong = decide(claims=mine(fails=True))
    assert not wrong.ok and "MY-CLAIM is listed as proved and came out as refuted" in wrong.failures[0]
    assert "NOT AS LISTED" in wrong.table()
    assert decide(claims=mine(fails=True, expect="refuted")).ok
    broken = decide(claims=mine()).claims["MY-CLAIM"].with_evidence(Evidence("property", "fail"))
    assert broken.status == "open" and not broken.as_listed


def test_a_claim_is_no_stronger_than_what_it_uses():
    claims = mine(uses=["BASE"], into=mine(id="BASE", fails=True))
    assert decide(["MY-CLAIM"], claims=claims).claims["MY-CLAIM"].status == "open"
    with pytest.raises(InputError, match="NOWHERE"):
        decide(claims=mine(uses=["NOWHERE"]))
    with pytest.raises(InputError, match="circle"):
        decide(claims=mine(uses=["MY-CLAIM"]))


def test_ids_are_unique_and_known():
    with pytest.raises(InputError, match="registered twice"):
        mine(into=mine())
    with pytest.raises(InputError, match=r"NO-SUCH.*RMS-JAC"):
        decide(["NO-SUCH"])
    assert list(decide(["RMS-NORM"]).claims) == ["RMS-NORM"]
    with pytest.raises(InputError, match="evidence kind"):
        Evidence("rumour", "pass")


def test_uses_are_registered_and_proofs_use_only_proved(ledger):
    for entry in ledger.claims.values():
        assert set(entry.claim.uses) <= set(registry())
        if entry.status == "proved":
            assert all(ledger.claims[used].status == "proved" for used in entry.claim.uses)


@pytest.mark.parametrize("wrong", ["value", "multiplicity", "line"])
def test_a_wrong_spectrum_is_not_proved(wrong):
    """The spectrum engine notices a wrong eigenvalue, wrong multiplicities and a wrong eigenvector."""
    value = 1 / s if wrong == "value" else eps / s**3
    line = ones if wrong == "line" else along_x
    extra = 1 if wrong == "multiplicity" else 0
    spectrum = Spectrum(
        (Eigenspace(1 / s, d - 1 + extra, None, "rest"), Eigenspace(value, sp.S.One, line, "line"))
    )
    proof = Symbolic("wrong")
    spectrum.prove(rms_jacobian, RMS_FACTS, [inner(v, x)], proof)
    assert not proof.evidence().passed
