"""The tour runs as it stands, and a tour with another output would not pass."""

import doctest
import io
import re

import pytest

from .pages import ROOT, blocks

pytestmark = pytest.mark.integration
TOUR = ROOT / "docs" / "tour.md"
FLAGS = doctest.ELLIPSIS


def session(text, name):
    """One doctest of a page's ``pycon`` blocks, at the line numbers of the page."""
    lines = [""] * len(text.splitlines())
    for block in blocks(text):
        if block.language == "pycon":
            for number, line in enumerate(block.text.splitlines(), block.line - 1):
                lines[number] = line
    return doctest.DocTestParser().get_doctest("\n".join(lines) + "\n", {}, name, name, 0)


def run(test):
    """What failed, in doctest's words."""
    said = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.write)
    return said.getvalue()


def test_every_output_of_the_tour_is_the_real_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = session(TOUR.read_text(encoding="utf-8"), "docs/tour.md")
    assert len(test.examples) > 40
    failed = run(test)
    assert not failed, failed


def test_an_output_that_is_not_the_real_one_is_named():
    page = "# A page\n\n```pycon\n>>> 1 + 1\n{}\n\n```\n\nText.\n"
    assert not run(session(page.format(2), "page"))
    failed = run(session(page.format(3), "page"))
    assert "line 4, in page" in failed
    assert "Expected:\n    3\nGot:\n    2" in failed


def test_the_dots_hide_digits_and_no_words():
    for example in session(TOUR.read_text(encoding="utf-8"), "tour").examples:
        if "..." in example.want:
            assert len(re.findall(r"\d\.\.\.|\d\.\d\.\.\.", example.want)) == example.want.count("..."), (
                example.want
            )
