"""The answer on the front page says of every decided hypothesis what the committed studies decided."""

from __future__ import annotations

import re
from pathlib import Path

from preln.report.findings import overall, read_runs, verdict_table

ROOT = Path(__file__).parents[2]
LINES = {
    "Held": {"supported"},
    "Did not hold": {"unsupported", "unsupported where decided"},
    "Held in part": {"mixed", "supported where decided"},
    "Undecided": {"inconclusive"},
}


def answers() -> dict[str, str]:
    """The lines of the answer by their first words."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The answer in five lines\n")[2].partition("\n## ")[0]
    items = re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- |\Z)", section, re.MULTILINE | re.DOTALL)
    return dict(items)


def test_every_hypothesis_stands_in_the_line_of_its_verdict():
    table = verdict_table(read_runs(ROOT / "experiments" / "results"))
    decided = {str(name): overall(list(own["status"])) for name, own in table.groupby("id")}
    said = answers()
    assert list(said) == [*LINES, "So"]
    placed = {name: re.findall(r"HYP-[A-Z0-9-]+[A-Z0-9]", text) for name, text in said.items()}
    for line, words in LINES.items():
        for name in placed[line]:
            assert decided[name] in words, (line, name, decided[name])
    named = [name for line in LINES for name in placed[line]]
    assert sorted(named) == sorted(name for name, word in decided.items() if word != "untested")
