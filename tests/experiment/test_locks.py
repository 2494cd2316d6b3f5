"""Several processes at once: one lock, one step, one file of stored states, and no living work removed."""

import fcntl
import io
import itertools
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from preln.base import locks
from preln.base.files import locked_file
from preln.experiment import RunStore
from preln.experiment.store import WORK
from preln.models import load_model

pytestmark = pytest.mark.integration


def test_cleaning_leaves_the_part_that_a_worker_writes(tmp_path):
    store = RunStore(tmp_path)
    mine, dead = tmp_path / ".heal-a-0.001.abcd.part", tmp_path / ".heal-a-0.efgh.part"
    for part in (mine, dead):
        part.mkdir()
        (part / "x").write_text("x")
    with store.claimed("heal-a-0.001"), store.locked():
        assert not mine.exists() and not dead.exists()
    for part in (mine, dead):
        part.mkdir()
    with locked_file(tmp_path / WORK / "heal-a-0.001.lock"), store.locked():
        assert mine.exists() and not dead.exists()
    with store.locked():
        assert not mine.exists()


def _count(folder, times):
    for _ in range(times):
        with locked_file(folder / "lock"):
            value = int((folder / "count").read_text())
            time.sleep(0.0005)
            (folder / "count").write_text(str(value + 1))


def test_a_lock_is_one_processes_at_a_time_also_as_its_file_comes_and_goes(tmp_path):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_count, args=(tmp_path, 100)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert (tmp_path / "count").read_text() == "300"
    assert not (tmp_path / "lock").exists()
    with locked_file(tmp_path / "lock"), pytest.raises(BlockingIOError):
        locked_file(tmp_path / "lock", wait=False).__enter__()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupt_while_a_lock_is_taken_leaves_no_file_but_another_ones(tmp_path, monkeypatch, after):
    """The first moment is right after the file is made, then two while its lock is asked for."""
    target, calls = tmp_path / "lock", itertools.count(1)

    def interrupted(original):
        def call(*values, **kwargs):
            found = original(*values, **kwargs)
            if next(calls) == after:
                if isinstance(found, io.IOBase):
                    found.close()
                raise KeyboardInterrupt
            return found

        return call

    monkeypatch.setattr(Path, "open", interrupted(Path.open))
    monkeypatch.setattr(locks.fcntl, "flock", interrupted(fcntl.flock))
    monkeypatch.setattr(locks.os.path, "samestat", interrupted(os.path.samestat))
    with pytest.raises(KeyboardInterrupt), locked_file(target):
        raise AssertionError("it was not interrupted")
    assert not target.exists()
    with target.open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        calls = itertools.count(1)
        with pytest.raises((KeyboardInterrupt, BlockingIOError)), locked_file(target, wait=False):
            raise AssertionError("two hold it")
        assert target.exists()


def test_two_that_want_the_same_stored_states_fill_them_once(tmp_path, monkeypatch):
    import torch

    from preln.heal.prefix import states as prefix
    from preln.heal.rows.examples import as_examples

    model, _ = load_model("tiny:llama:2")
    examples = as_examples(torch.randint(0, 50, (12, 8), generator=torch.Generator().manual_seed(0)))
    original, rows, found = prefix._fill, [], []

    def slow(model, blocks, part, maps, numbers):
        rows.extend(numbers)
        time.sleep(0.05)
        original(model, blocks, part, maps, numbers)

    monkeypatch.setattr(prefix, "_fill", slow)
    told = {"identity": {"model": "m"}, "batch_size": 2}

    def build():
        found.append(prefix.build_prefix(model, examples, [1, 2], tmp_path, **told))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rows) == list(range(12))
    assert len(found) == 3
    assert sorted(os.listdir(tmp_path)) == ["prefix.json", "prefix.safetensors"]


def test_two_processes_that_want_one_step_run_it_once(tmp_path):
    from preln.experiment import Step

    ran = []

    def work(folder, _workspace):
        ran.append(1)
        time.sleep(0.2)
        (folder / "x").write_text("x")

    step = Step("only", "probe", {"a": 1}, (), work)
    threads = [threading.Thread(target=RunStore(tmp_path).execute, args=(step,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == [1]
    RunStore(tmp_path).verified("only")
