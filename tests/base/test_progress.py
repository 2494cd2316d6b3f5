from __future__ import annotations

import io
import sys

import pytest
import tqdm.std

from preln.base.progress import end_bars, note, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def eager(monkeypatch):
    """Bars are drawn after every item, however fast they come."""
    init = tqdm.std.tqdm.__init__

    def made(self, *args, **kwargs):
        init(self, *args, **kwargs, mininterval=0, miniters=1)

    monkeypatch.setattr("preln.base.progress._DELAY_S", 0.0)
    monkeypatch.setattr(tqdm.std.tqdm, "monitor_interval", 0)
    monkeypatch.setattr(tqdm.std.tqdm, "__init__", made)


def test_silent_where_nobody_looks(capsys):
    assert list(track([1, 2, 3], label="count", state=lambda: 1 / 0)) == [1, 2, 3]  # not asked either
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_how_things_stand(eager, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = []
    for item in track(iter("abc"), label="letters", total=3, state=lambda: f"last {seen[-1]}"):
        seen.append(item)
    shown = sys.stderr.getvalue()
    assert "letters" in shown and "2/3 [" in shown
    assert shown.index("1/3 [") < shown.index("last a") < shown.index("2/3 [") < shown.index("last b")
    assert shown.endswith("\r") and not shown.rsplit("\r", 2)[1].strip(), "the bar is left behind"


def test_without_words_it_is_a_plain_bar(eager, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track([1, 2], label="count")) == [1, 2]
    assert "1/2 [" in sys.stderr.getvalue()


def test_leaving_early_clears_the_bar(eager, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for item in track([1, 2, 3], label="count"):
        if item == 2:
            break
    assert "1/3 [" in sys.stderr.getvalue() and sys.stderr.getvalue().endswith("\r")


def test_a_note_is_written_whoever_looks(capsys):
    note("one line")
    assert capsys.readouterr() == ("", "one line\n")


def test_bars_that_were_not_finished_end_their_line(eager):
    said = Terminal()
    bars = [tqdm.std.tqdm(total=4, file=said, leave=leave) for leave in (True, False)]
    bars[0].update(1)
    bars.append(tqdm.std.tqdm.__new__(tqdm.std.tqdm))  # interrupted while it was being made
    end_bars()
    assert "25%" in said.getvalue() and said.getvalue().endswith(("\n", "\r"))
    before = said.getvalue()
    end_bars()
    assert said.getvalue() == before
