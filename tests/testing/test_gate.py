"""The gate of the ledger: nothing to say about this checkout, and something about every way to break it."""

import shutil
from dataclasses import replace

import pytest

from preln.base.errors import InputError
from preln.testing import gate
from preln.theory import Evidence, Ledger, registry


@pytest.fixture
def root(tmp_path):
    """A copy of the written proofs, beside the real tests."""
    shutil.copytree(gate.checkout() / "theory", tmp_path / "theory")
    (tmp_path / "tests").symlink_to(gate.checkout() / "tests")
    (tmp_path / "pyproject.toml").symlink_to(gate.checkout() / "pyproject.toml")
    return tmp_path


@pytest.fixture
def no_collection(monkeypatch):
    monkeypatch.setattr(gate, "_uncollected", lambda sections, root: [])


def test_this_checkout_passes(ledger):
    assert gate.problems(ledger, gate.checkout()) == []


@pytest.mark.parametrize(
    ("page", "old", "new", "complaint"),
    [
        ("norms.md", "## RMS-NORM\n", "## RMS-NORMAL\n", "RMS-NORM: no section"),
        ("norms.md", "## RMS-NORM\n", "## RMS-NORMAL\n", "RMS-NORMAL: theory/norms.md has it"),
        ("norms.md", "## LN-JAC\n", "## RMS-JAC\n", "RMS-JAC: it has 2 sections"),
        ("norms.md", "**Statement (refuted).**", "**Statement.**", "listed as refuted"),
        (
            "norms.md",
            "**Statement.** The Jacobian of x/sqrt",
            "**Statement.** The gradient of x/sqrt",
            "statement differs",
        ),
        ("norms.md", "**Assumptions.** the layer's", "**Assumptions.** a layer's", "assumptions differ"),
        ("norms.md", "norms.rms_jac`", "norms.rms_spec`", "is not the function"),
        ("norms.md", "norms.rms_jac`", "nowhere.rms_jac`", "is not the function"),
        (
            "block.md",
            "tests/testing/checks/test_block.py",
            "tests/testing/test_gone.py",
            "does not exist",
        ),
        ("block.md", "Derived by", "Found by", "must name one function"),
        ("block.md", "**Statement.** A norm", "A norm", "does not begin"),
    ],
)
def test_a_page_that_disagrees_is_named(ledger, root, no_collection, page, old, new, complaint):
    text = (root / "theory" / page).read_text()
    assert old in text
    (root / "theory" / page).write_text(text.replace(old, new, 1))
    assert any(complaint in line for line in gate.problems(ledger, root)), gate.problems(ledger, root)


def test_a_section_on_the_wrong_page_is_named(ledger, root, no_collection):
    (root / "theory" / "healing.md").rename(root / "theory" / "cures.md")
    assert "HEAL-COST: it stands in cures.md, its family's page is healing.md" in gate.problems(ledger, root)


def test_a_file_without_tests_is_not_collected(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_empty.py").write_text("VALUE = 1\n")
    (tmp_path / "tests" / "test_full.py").write_text("def test_it():\n    pass\n")
    text = "tested by `tests/test_empty.py`, `tests/test_full.py`."
    assert gate._uncollected([gate.Section("norms.md", "X", text)], tmp_path) == ["tests/test_empty.py"]


def tampered(ledger, id, **changes):
    claims = dict(ledger.claims)
    claims[id] = replace(claims[id], **changes)
    return "\n".join(gate.problems(Ledger(claims), gate.checkout()))


def test_decisions_that_are_too_strong_are_named(ledger, no_collection):
    assert "RMS-JAC: open" in tampered(ledger, "RMS-JAC", status="open")
    assert "RMS-SPEC: it uses RMS-JAC, which is open" in tampered(ledger, "RMS-JAC", status="open")
    refuted = tampered(ledger, "RMS-JAC", status="refuted")
    assert "RMS-SPEC: proved, though it uses RMS-JAC, which is refuted" in refuted
    assert "RMS-JAC: listed as proved, came out as refuted" in refuted
    fixed = (Evidence("symbolic_fixed_d", "pass"),)
    assert "RMS-JAC: proved without a proof" in tampered(ledger, "RMS-JAC", evidence=fixed)
    assert "RMS-JAC: no negative control" in tampered(ledger, "RMS-JAC", evidence=fixed)
    survivor = {"negative_controls": [{"name": "eps dropped", "mutation": "eps dropped", "rejected": False}]}
    evidence = (Evidence("symbolic", "pass", survivor),)
    assert "RMS-JAC: the mutant 'eps dropped' survives" in tampered(ledger, "RMS-JAC", evidence=evidence)


def test_a_theorem_without_numbers_is_named(ledger, no_collection, monkeypatch):
    monkeypatch.setattr(gate, "checks", dict)
    assert any("RMS-JAC: no check on numbers" in line for line in gate.problems(ledger, gate.checkout()))


def test_every_family_has_its_page():
    from preln.theory.ledger import family_of

    assert {family_of(c) for c in registry().values() if c.kind == "theorem"} == set(gate.PAGES)


def test_an_installed_package_has_no_gate(monkeypatch, tmp_path):
    monkeypatch.setattr(gate.preln, "__file__", str(tmp_path / "a" / "b" / "preln.py"))
    with pytest.raises(InputError, match="checkout"):
        gate.checkout()
