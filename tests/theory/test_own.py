"""Claims of a user's own file: the documented example, and every way to get it wrong."""

import json
from pathlib import Path

import pytest

from preln.base.errors import InputError
from preln.cli import main
from preln.theory import CLAIMS, decide, registry
from preln.theory.own import own_claims

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "own_claims.py"
HEAD = "from preln.theory import Evidence, claim\n"
MINE = HEAD + "@claim('{id}', title='t', statement='s', uses={uses})\ndef f():\n    {body}\n"


def test_the_example_is_told_apart(capsys, tmp_path):
    assert (
        main(["verify", "MY-LENGTH", "MY-MEAN", "--ledger", str(EXAMPLE), "--out", str(tmp_path / "out")])
        == 1
    )
    printed = capsys.readouterr().out
    assert "MY-MEAN is listed as proved and came out as refuted" in printed
    claims = {c["id"]: c for c in json.loads((tmp_path / "out" / "ledger.json").read_text())["claims"]}
    assert claims["MY-LENGTH"]["status"] == "proved" and claims["MY-MEAN"]["status"] == "refuted"
    gain, x, eps = claims["MY-MEAN"]["evidence"][0]["detail"]["instance"]["drawn"]
    assert len(gain) == len(x) == 4 and eps > 0
    assert "MY-MEAN" not in registry()


def test_the_example_is_the_one_in_the_docs():
    page = (DOCS / "own-claims.md").read_text()
    assert EXAMPLE.read_text() in page
    assert len(EXAMPLE.read_text().splitlines()) < 30


def file(tmp_path, *, id="MINE", uses=(), body="return [Evidence('smt', 'pass')]"):
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(id=id, uses=list(uses), body=body))
    return path


def test_claims_last_as_long_as_they_are_needed(tmp_path):
    for _ in range(2):
        with own_claims([file(tmp_path)]) as ids:
            assert ids == ["MINE"] and decide(["MINE"]).claims["MINE"].status == "proved"
        assert "MINE" not in CLAIMS


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n", "registers no claim"),
        ("x = = 1\n", "SyntaxError"),
        ("import nowhere\n", "ModuleNotFoundError"),
        (MINE.format(id="RMS-JAC", uses=[], body="return []"), "registered twice"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, complaint):
    path = tmp_path / "bad.py"
    path.write_text(text)
    before = dict(CLAIMS)
    with pytest.raises(InputError, match=rf"bad\.py: .*{complaint}"), own_claims([path]):
        pass
    assert before == CLAIMS


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"gone\.py: no such Python file"), own_claims(["gone.py"]):
        pass


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise ValueError('no')", "MINE: its function failed with ValueError: no"),
        ("return None", "MINE: its function failed with TypeError"),
        ("return ['proved']", "MINE: its function failed with TypeError: it must return pieces of Evidence"),
    ],
)
def test_a_bad_decision_is_named(tmp_path, body, complaint):
    with own_claims([file(tmp_path, body=body)]), pytest.raises(InputError, match=complaint):
        decide(["MINE"])


def test_numbers_alone_prove_nothing(tmp_path):
    with own_claims([file(tmp_path, body="return [Evidence('property', 'pass')]")]):
        assert decide(["MINE"]).claims["MINE"].status == "open"
    with own_claims([file(tmp_path, uses=["LN-NORM"])]):
        assert decide(["MINE"]).claims["MINE"].status == "open"


def test_the_gate_takes_no_claims(capsys):
    assert main(["verify", "--check", "--ledger", str(EXAMPLE)]) == 2
    assert "--check" in capsys.readouterr().err
