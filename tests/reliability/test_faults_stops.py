"""Memory that runs out, Ctrl-C once and twice, a clock that jumps: told in one line, and nothing is lost."""

import ast
import itertools
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import preln
from preln import cli
from preln.base import faults
from preln.base.errors import InputError
from preln.base.locks import claimed_folder
from preln.experiment import RunStore
from preln.experiment import steps as work

from . import commands

pytestmark = pytest.mark.integration
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SHORTAGES = [
    (MemoryError(), "memory ran out:"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.5 GiB more"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes."),
        "4.00 MiB",
    ),
    (MemoryError("Unable to allocate 7.45 GiB for an array with shape (10,)"), "7.45 GiB more"),
]


@pytest.mark.parametrize(("error", "amount"), SHORTAGES)
def test_memory_that_runs_out_in_a_step_is_told_by_its_name_and_the_run_continues(
    error, amount, prepared, undisturbed, disk, tmp_path, capsys, monkeypatch
):
    expected, _ = undisturbed("run", disk)
    words = [*commands.commands(prepared)["run"], "--out", str(tmp_path / "out")]
    calls, original = itertools.count(), work.perplexity

    def short(*args, **kwargs):
        if next(calls) == 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(work, "perplexity", short)
    assert cli.main(words) == 2
    line = commands.one_line(capsys.readouterr().err)
    assert "step prune-block_influence-1: " in line and amount in line and "data.evaluation.length" in line
    assert commands.unfinished(tmp_path) == []
    kept = sorted(path.parent.name for path in (tmp_path / "out").glob("*/step.json"))
    assert kept == ["damage", "probe", "prune-reverse-1", "score"]
    before = {name: RunStore(tmp_path / "out").verified(name) for name in kept}
    assert cli.main(words) == 0
    assert {name: RunStore(tmp_path / "out").verified(name) for name in kept} == before
    assert commands.results(tmp_path / "out") == expected


def test_other_errors_of_a_step_are_not_called_a_lack_of_memory(prepared, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(work, "perplexity", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main([*commands.commands(prepared)["run"], "--out", str(tmp_path / "out")])
    assert commands.unfinished(tmp_path) == []
    assert not faults.is_out_of_memory(preln.InputError("out of memory"))


def test_memory_that_really_runs_out(prepared, tmp_path, tmp_path_factory):
    """With little more than what the process has, a large batch is refused by the allocator itself.

    A batch's states are larger than what the allocator ever takes from memory that the process has freed.
    """

    def limit():
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 48 * 2**20, resource.RLIM_INFINITY))

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell how much memory is mapped")
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("\n".join([(prepared / "text.jsonl").read_text()] * 3), encoding="utf-8")
    data = ["--data", str(text), "--sequences", "768", "--length", "192"]
    words = ["probe", commands.MODEL, *data, "--measures", "stream", "--out", str(tmp_path / "out")]
    ended = commands.carry_out([*words, "--batch-size", "768"], tmp_path, limit)
    assert ended.code == 2, ended
    line = commands.one_line(ended.errors)
    assert "probe: memory ran out, " in line and "lower --batch-size" in line
    assert list(tmp_path.iterdir()) == []
    assert commands.carry_out([*words, "--batch-size", "32"], tmp_path).code == 0


@pytest.mark.parametrize("verb", commands.VERBS)
def test_ctrl_c_once_and_twice_at_any_moment(verb, prepared, undisturbed, disk, tmp_path, quick_figures):
    expected, _ = undisturbed(verb, disk)
    words = [*commands.commands(prepared)[verb], "--out", str(tmp_path / "whole")]
    began = time.perf_counter()
    assert commands.carry_out(words, tmp_path).code == 0
    seconds, rng, heard = time.perf_counter() - began, random.Random(verb), 0
    tries = 20 if THOROUGH else 2 if verb in ("run", "report") else 3
    for number, presses in itertools.product(range(tries), (1, 2)):
        folder = tmp_path / f"{number}-{presses}"
        folder.mkdir()
        words = [*commands.commands(prepared)[verb], "--out", str(folder / "out")]
        process = commands.Process(words, folder)
        time.sleep(rng.uniform(0.02, 0.9) * seconds)
        for _ in range(presses):
            process.signal(signal.SIGINT)
            time.sleep(rng.uniform(0.0, 0.03))
        ended = process.wait()
        assert ended.code in (0, 130), ended
        if ended.code == 130:
            heard += 1
            line = commands.one_line(ended.errors)
            there = verb not in ("run", "report") and (folder / "out").exists()
            done = there and "interrupted twice" not in line
            assert ("out is whole" if done else "the same command") in line
        assert commands.unfinished(folder) == [], ended
        whole = verb not in ("run", "report") and (folder / "out").exists()  # heard on the way out
        if whole:
            assert commands.results(folder / "out") == expected
        if whole or (ended.code == 130 and presses == 1):
            assert cli.main(words) == 0
            found = commands.results(folder / "out")
            assert {n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)} == set()
    assert heard >= 1


def test_a_second_ctrl_c_does_not_wait_for_what_the_first_waits_for(tmp_path):
    """Work that ends slowly, and work that hides the interrupt, both stop at the second."""

    def slow(_arguments):
        from preln.base.files import staged_directory

        with staged_directory(tmp_path / "result") as folder:
            (folder / "half").write_text("x")
            (tmp_path / "ready").write_text("x")
            while True:
                try:
                    time.sleep(30)
                except KeyboardInterrupt:
                    (tmp_path / "hidden").write_text("x")

    def first():
        slow.__name__ = "sources"
        cli.sources = slow

    process = commands.Process(["sources"], tmp_path, first)
    for name in ("ready", "hidden"):
        while not (tmp_path / name).exists():
            time.sleep(0.01)
        time.sleep(0.05)
        began = time.monotonic()
        process.signal(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and time.monotonic() - began < 20
    assert "interrupted twice" in commands.one_line(ended.errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden", "ready"]


@pytest.mark.parametrize("moment", ["before the line", "after it"])
def test_a_second_ctrl_c_while_the_first_is_told_says_nothing_more(moment, tmp_path):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    def first():
        interrupted.__name__ = "sources"
        cli.sources = interrupted
        name = "abandon" if moment == "before the line" else "left"
        original = getattr(cli, name)

        def slow(*values):
            original(*values)
            (tmp_path / "ready").write_text("x")
            until = time.monotonic() + (0.3 if name == "abandon" else 30)
            while time.monotonic() < until:
                time.sleep(0.01)

        setattr(cli, name, slow)

    process, began = commands.Process(["sources"], tmp_path, first), time.monotonic()
    while not (tmp_path / "ready").exists() and time.monotonic() - began < 20:
        time.sleep(0.01)
    process.signal(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and time.monotonic() - began < 20
    assert "the same command continues" in commands.one_line(ended.errors)


def test_an_interrupt_that_cannot_be_raised_is_raised_a_moment_later(tmp_path):
    """In a finaliser Python would print a traceback and go on."""

    class Final:
        def __del__(self):
            (tmp_path / "ready").write_text("x")
            time.sleep(30)

    def slow(_arguments):
        Final()
        time.sleep(30)
        return {}, 0

    def first():
        slow.__name__ = "sources"
        cli.sources = slow

    process = commands.Process(["sources"], tmp_path, first)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    time.sleep(0.05)
    began = time.monotonic()
    process.signal(signal.SIGINT)
    ended = process.wait()
    assert ended.code == 130 and time.monotonic() - began < 20  # both sleeps are cut short
    assert "the same command continues" in commands.one_line(ended.errors)


@pytest.mark.parametrize("end", [KeyboardInterrupt, InputError])
def test_what_is_said_stands_apart_from_a_bar_that_was_not_finished(end, tmp_path):
    def halfway(_arguments):
        bar = tqdm(total=10, desc="Loading", file=sys.stderr)
        bar.update(3)
        raise end("a reason")

    def first():
        halfway.__name__ = "sources"
        cli.sources = halfway

    ended = commands.carry_out(["sources"], tmp_path, first)
    assert "30%" in ended.errors
    said = "preln: a reason" if end is InputError else "preln: interrupted: "
    assert commands.one_line(ended.errors).startswith(said)


def test_a_command_killed_while_it_draws_holds_up_no_other(tmp_path, monkeypatch):
    """Of the scaffold: the lock that bars share with forks would stay taken for ever."""
    monkeypatch.setattr(commands, "HANGS_S", 30.0)
    tqdm.get_lock()  # from here on it is there

    def killed():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert commands.carry_out(["sources"], tmp_path, killed).code == -signal.SIGKILL
    assert commands.carry_out(["sources"], tmp_path, lambda: tqdm(total=1).close()).code == 0
    acquired = threading.Thread(target=lambda: tqdm(total=1).close(), daemon=True)
    acquired.start()
    acquired.join(20)
    assert not acquired.is_alive()


def test_a_command_that_hangs_is_ended_and_shows_where(tmp_path, monkeypatch):
    """Of the scaffold: no test here waits without end."""

    def stuck_here():
        while True:
            time.sleep(1)

    monkeypatch.setattr(commands, "HANGS_S", 0.2)
    ended = commands.carry_out(["sources"], tmp_path, stuck_here)
    assert ended.code == -signal.SIGKILL and "in stuck_here" in ended.errors


def test_a_program_that_calls_the_command_line_keeps_its_own_interrupts(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["sources"]) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_clock_that_jumps_changes_nothing(prepared, undisturbed, disk, tmp_path, capsys, monkeypatch):
    expected, _ = undisturbed("run", disk)
    out = tmp_path / "out"
    words = [*commands.commands(prepared)["run"], "--out", str(out)]
    day, tick = 86400.0, itertools.count()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(tick) * 9 * day)
    dates = itertools.cycle(["2031-01-01T00:00:00+00:00", "1999-01-01T00:00:00+00:00"])
    monkeypatch.setattr("preln.experiment.run.now", lambda: next(dates))
    monkeypatch.setattr("preln.base.provenance.now", lambda: next(dates))
    original = work.heal_step

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "heal_step", stop)
    assert cli.main(words) == 130
    for number, path in enumerate(sorted(out.rglob("*"))):  # as files of a machine with another clock
        stamp = real() + (-1) ** number * 400 * day
        os.utime(path, (stamp, stamp))
    monkeypatch.setattr(work, "heal_step", original)
    began = time.perf_counter()
    assert cli.main([*words, "--json"]) == 0
    elapsed = time.perf_counter() - began
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 <= said["seconds"] <= elapsed
    assert said["reused"] == 5 and said["ran"] == ["heal-reverse-1-partial-1", "decide"]
    for record in out.glob("*/step.json"):
        assert 0 <= json.loads(record.read_text())["seconds"] < 600
    assert commands.results(out) == expected


def test_a_lock_has_no_age(tmp_path, prepared, capsys):
    """An old file that nobody holds does not keep anybody out; a held one does, however old it looks."""
    words = [*commands.commands(prepared)["evaluate"], "--out", str(tmp_path / "out")]
    lock = tmp_path / ".out.lock"
    for stamp in (0, 4e9):
        with claimed_folder(tmp_path / "out"):
            os.utime(lock, (stamp, stamp))
            assert cli.main(words) == 2
            assert "another command is writing there" in commands.one_line(capsys.readouterr().err)
    lock.write_text("")
    os.utime(lock, (0, 0))
    assert cli.main(words) == 0
    assert commands.unfinished(tmp_path) == []


def test_no_decision_is_taken_by_the_wall_clock():
    """``time.time`` is nowhere; a date is only written down, a file's time only names a converted model."""
    root = Path(cli.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if (owner, node.attr) == ("time", "time") or node.attr in (
                    "getmtime",
                    "st_mtime",
                    "st_mtime_ns",
                ):
                    found.add((path.relative_to(root).as_posix(), node.attr))
                if node.attr in ("now", "utcnow", "today") and "date" in owner:
                    found.add((path.relative_to(root).as_posix(), node.attr))
    # a file's time is part of what it is known by, equal or not: it is never earlier or later than another
    known = {("models/load.py", "st_mtime_ns"), ("folders.py", "st_mtime_ns")}
    assert found == {("base/provenance.py", "now")} | known
