"""The gate of the ledger: `preln verify --check`, for a checkout of the project.

IDs are unique, every theorem has one section in the written proofs with the registry's own words, what the
section names exists and is collected, every claim is decided and as listed, none is stronger than what it
uses, and no theorem goes without negative controls, all noticed, and a check on numbers.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import preln
from preln.base.errors import InputError
from preln.testing.checks import checks, measurements
from preln.theory import Ledger, registry
from preln.theory.claims import PROOFS, Claim
from preln.theory.ledger import family_of

PAGES = {
    "Normalisation layers": "norms.md",
    "One block": "block.md",
    "Depth": "depth.md",
    "Pruning and similarity": "pruning.md",
    "Healing": "healing.md",
}
"""Family -> page of the written proofs."""
SECTION = re.compile(r"^## (\S+)\n(.*?)(?=^## |\Z)", flags=re.M | re.S)
LEAD = re.compile(r"\*\*Statement( \(refuted\))?\.\*\* (.*?)\n\n(?:\*\*Assumptions\.\*\* (.*?)\n\n)?", re.S)


@dataclass(frozen=True)
class Section:
    """One theorem in the written proofs."""

    page: str
    id: str
    text: str

    @property
    def tests(self) -> list[str]:
        """The test files that the section names."""
        return re.findall(r"`(tests/[\w/]+\.py)`", self.text)


def checkout() -> Path:
    """Return the folder of the checkout that this package runs from.

    Raises:
        InputError: the package was installed without its written proofs and tests.
    """
    root = Path(preln.__file__).resolve().parents[2]
    if not (root / "theory").is_dir() or not (root / "tests").is_dir():
        raise InputError(
            "--check: the written proofs and tests are not here: run it from a checkout of preln"
        )
    return root


def problems(ledger: Ledger, root: Path) -> list[str]:
    """Return one line for everything that is not as it should be; nothing if all is well.

    Args:
        ledger: every claim, decided.
        root: the checkout, with `theory/` and `tests/`.
    """
    pages = sorted((root / "theory").glob("*.md"))
    sections = [
        Section(page.name, id, text)
        for page in pages
        for id, text in SECTION.findall(page.read_text().replace("\\_", "_"))
    ]
    theorems = {id: c for id, c in registry().items() if c.kind == "theorem"}
    found = [f"{id}: it has {n} sections, one is enough" for id, n in _repeated(sections)]
    found += [f"{id}: no section in theory/*.md" for id in theorems.keys() - {s.id for s in sections}]
    for section in sections:
        if section.id in theorems:
            found += [f"{section.id}: {line}" for line in _section(section, theorems[section.id], root)]
        else:
            found.append(f"{section.id}: theory/{section.page} has it, the registry does not")
    found += [f"{test}: pytest collects no test in it" for test in _uncollected(sections, root)]
    return sorted(found) + [line for id in ledger.claims for line in _decision(id, ledger)]


def _repeated(sections: list[Section]) -> list[tuple[str, int]]:
    return [(id, n) for id, n in Counter(s.id for s in sections).items() if n > 1]


def _section(section: Section, claim: Claim, root: Path) -> Iterator[str]:
    """Yield what the section gets wrong about its theorem."""
    lead = LEAD.search(section.text)
    if lead is None:
        yield "the section does not begin with **Statement.** or **Statement (refuted).**"
    else:
        if " ".join(lead[2].split()) != claim.statement:
            yield "the statement differs from the registry's"
        if " ".join((lead[3] or "").split()) != "; ".join(claim.assumptions) + "." * bool(claim.assumptions):
            yield "the assumptions differ from the registry's"
        if bool(lead[1]) != (claim.expect == "refuted"):
            yield f"it is listed as {claim.expect}, the section says otherwise"
    if section.page != PAGES.get(family_of(claim)):
        yield f"it stands in {section.page}, its family's page is {PAGES.get(family_of(claim))}"
    named = re.findall(r"Derived by `([\w.]+)`", section.text)
    if len(named) != 1:
        yield "the section must name one function after 'Derived by'"
    elif not _is(named[0], claim):
        yield f"{named[0]} is not the function that decides it"
    if not section.tests:
        yield "the section names no test"
    yield from (f"{test} does not exist" for test in section.tests if not (root / test).is_file())


def _is(path: str, claim: Claim) -> bool:
    """Tell whether the dotted path imports and is the claim's function."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) is claim.decide
    except ImportError:
        return False


def _uncollected(sections: list[Section], root: Path) -> list[str]:
    """Return the named test files in which pytest finds no test."""
    named = sorted({test for s in sections for test in s.tests if (root / test).is_file()})
    if not named:
        return []
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    plain = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}  # -v changes lines
    done = subprocess.run(command, cwd=root, env=plain, capture_output=True, text=True, check=False)
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    return [test for test in named if test not in collected]


def _decision(id: str, ledger: Ledger) -> Iterator[str]:
    """Yield what is wrong with a claim's decision."""
    entry = ledger.claims[id]
    for used in entry.claim.uses:
        status = ledger.claims[used].status if used in ledger.claims else "not in the ledger"
        if status not in ("proved", "refuted"):
            yield f"{id}: it uses {used}, which is {status}"
        elif entry.status == "proved" and status != "proved":
            yield f"{id}: proved, though it uses {used}, which is {status}"
    if entry.claim.kind != "theorem":
        return
    if not entry.as_listed:
        yield f"{id}: listed as {entry.claim.expect}, came out as {entry.status}"
    if entry.status == "open":
        yield f"{id}: open"
    if entry.status == "proved" and not any(e.kind in PROOFS for e in entry.evidence):
        yield f"{id}: proved without a proof for every dimension"
    if not entry.controls:
        yield f"{id}: no negative control"
    yield from (f"{id}: the mutant '{c['name']}' survives" for c in entry.controls if not c["rejected"])
    if entry.status == "proved" and id not in checks() | measurements():
        yield f"{id}: no check on numbers"
