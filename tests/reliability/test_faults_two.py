"""Two commands with one folder at once: the second is refused, and the first ends as if it had been alone."""

import argparse
import os
import signal

import pytest

from preln import cli
from preln.base import locks
from preln.base.errors import InputError
from preln.base.files import staged_directory
from preln.base.locks import claimed_folder
from preln.folders import makes_folder

from . import commands

pytestmark = pytest.mark.integration


def stop_with_lock():
    """Have this process stop when it has its first lock."""
    take, stops = locks._Lock.take, iter([signal.SIGSTOP])

    def stop(*values):
        take(*values)
        for number in stops:
            os.kill(os.getpid(), number)

    locks._Lock.take = stop


@pytest.mark.parametrize("verb", commands.VERBS)
def test_the_second_is_refused_and_the_first_is_not_disturbed(
    verb, prepared, undisturbed, disk, tmp_path, capsys, quick_figures
):
    expected, _ = undisturbed(verb, disk)
    out = tmp_path / "out"
    words = [*commands.commands(prepared)[verb], "--out", str(out)]
    process = commands.Process(words, prepared, stop_with_lock)
    assert os.WIFSTOPPED(os.waitpid(process.number, os.WUNTRACED)[1])  # it stays in the middle
    capsys.readouterr()
    try:
        assert cli.main(words) == 2
    finally:
        os.kill(process.number, signal.SIGCONT)
    line = commands.one_line(capsys.readouterr().err)
    assert str(out) in line and "is writing" in line and "another --out" in line
    assert process.wait().code == 0
    assert commands.results(out) == expected
    assert commands.unfinished(tmp_path) == []
    assert cli.main(words) == 0  # what is whole is kept
    assert commands.results(out) == expected


def test_names_of_one_folder_are_one_lock_and_what_is_above_it_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    with claimed_folder("a/b/out"):
        assert (tmp_path / "a" / "b" / ".out.lock").is_file()
        for name in ("link/b/out", tmp_path / "a" / "b" / "out", "a/b/../b/out/"):
            with pytest.raises(InputError, match="another command"), claimed_folder(name):
                pass
        with claimed_folder("a/b/other"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), claimed_folder("file/out"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    def hold():
        held = claimed_folder(tmp_path / "out")
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert commands.carry_out(["sources"], tmp_path, hold).code == -signal.SIGKILL
    assert (tmp_path / ".out.lock").exists()
    with claimed_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / ".out.lock").exists()


def test_the_processes_of_one_launcher_work_together(tmp_path, monkeypatch):
    verb = makes_folder(vars)(lambda arguments: ({"out": arguments.out}, 0))
    arguments = argparse.Namespace(out=str(tmp_path / "out"))
    with claimed_folder(tmp_path / "out"):
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="another command"):
            verb(arguments)
        monkeypatch.setenv("RANK", "1")
        assert verb(arguments) == ({"out": arguments.out}, 0)


def test_without_the_lock_the_later_result_does_not_replace_the_earlier(tmp_path):
    with pytest.raises(InputError, match="not empty"), staged_directory(tmp_path / "out") as late:
        (late / "x").write_text("late")
        with staged_directory(tmp_path / "out") as early:
            (early / "x").write_text("early")
    assert (tmp_path / "out" / "x").read_text() == "early"
    assert commands.unfinished(tmp_path) == []
