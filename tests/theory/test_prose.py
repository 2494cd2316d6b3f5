"""The written proofs and the registry agree: same theorems, same outcome, names that exist."""

import importlib
import re
from pathlib import Path

import pytest

from preln.theory import registry

ROOT = Path(__file__).parents[2]
SECTIONS = {
    id: text
    for page in sorted((ROOT / "theory").glob("*.md"))
    for id, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page.read_text(), flags=re.M | re.S)
}


def test_every_theorem_has_its_section():
    assert set(SECTIONS) == {id for id, c in registry().items() if c.kind == "theorem"}


@pytest.mark.parametrize("id", sorted(SECTIONS))
def test_a_section_tells_the_truth_about_its_theorem(id):
    text, listed = SECTIONS[id], registry()[id]
    assert ("(refuted)" in text) == (listed.expect == "refuted")
    (path,) = re.findall(r"Derived by `([\w.]+)`", text)
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is listed.decide
    tests = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert tests and all((ROOT / test).exists() for test in tests)
