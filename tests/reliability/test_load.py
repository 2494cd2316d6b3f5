"""Load at a small scale: what is held stays small, progress shows, and a full store is read once through."""

import json
import sys
import tracemalloc

import pytest

from preln.data import load_rows, load_tokens
from preln.experiment import store as module
from preln.experiment.store import RunStore, Step
from preln.models import tiny_tokenizer

BENCHMARK = "load"
pytestmark = pytest.mark.integration


@pytest.fixture
def load(benchmark):
    return benchmark


def test_growth_is_the_slope_behind_the_first_tenth(load):
    def growth(*seen):
        return load.Watch(list(seen)).growth(1000)

    mib = load.MIB
    assert growth((0, 0), (100, 9 * mib), (1000, 9 * mib)) == 0.0  # what is loaded once is not growth
    assert growth((0, 0), (100, 0), (600, mib)) == pytest.approx(2.0)
    assert growth((0, 0), (100, 0), (1000, 9 * mib)) == pytest.approx(10.0)


def test_the_store_carries_many_steps_and_shows_progress(load, tmp_path):
    found = load.store(40, tmp_path / "run")
    assert found.progress and found.count == 40 and found.open_seconds > 0
    assert len([p for p in (tmp_path / "run").iterdir() if p.name.startswith("step-")]) == 40


def steps(count):
    def fill(folder, _):
        (folder / "x.json").write_text("1")

    return [Step(f"s{k}", "trivial", {"k": k}, (f"s{k - 1}",) if k else (), fill) for k in range(count)]


def records_read(tmp_path, monkeypatch, count):
    """How many records are read to find all steps of a full store kept."""
    held = RunStore(tmp_path / str(count))
    for step in steps(count):
        held.execute(step)
    honest, read = module.read_json, []
    monkeypatch.setattr(module, "read_json", lambda path: read.append(path) or honest(path))
    assert all(RunStore(held.root).is_finished(step) for step in steps(count))
    monkeypatch.setattr(module, "read_json", honest)
    return len(read)


def test_opening_a_store_reads_every_record_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    few, many = (records_read(tmp_path, monkeypatch, count) for count in (5, 20))
    assert 5 <= few <= 4 * 5
    assert many <= 4 * few + 4  # in proportion: with squares it would be sixteen times


def peak(call):
    tracemalloc.start()
    call()
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


def test_a_limited_read_takes_the_same_memory_from_a_longer_file(load, tmp_path):
    peaks = {}
    for count in (1000, 4000):
        load.write_rows(tmp_path / f"{count}.jsonl", count)
        for limit in (100, None):
            path = tmp_path / f"{count}.jsonl"
            peaks[count, limit] = peak(lambda path=path, limit=limit: load_rows(path, limit=limit))
    assert peaks[4000, 100] < 1.5 * peaks[1000, 100]
    assert peaks[4000, None] > 3 * peaks[1000, None]  # negative control: what is held whole does grow


def test_the_benchmarks_rows_are_distinct_and_of_one_form(load, tmp_path):
    load.write_rows(tmp_path / "rows.jsonl", 50)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["instruction"] for row in rows}) == 50
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)


def test_many_sequences_go_through_the_probe(load):
    found = load.probe(24)
    assert found.count == 24 and found.peak_mib >= 0.0


@pytest.mark.parametrize("read", ["rows", "tokens"])
def test_reading_shows_progress_to_a_terminal_alone(load, tmp_path, read, monkeypatch):
    from preln.base import progress

    monkeypatch.setattr(progress, "_DELAY_S", 0.0)
    path = tmp_path / "rows.jsonl"
    load.write_rows(path, 300)

    def call():
        if read == "rows":
            load_rows(path)
        else:
            load_tokens(path, tiny_tokenizer(), sequences=2, length=16)

    terminal = load.Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    call()
    assert read in terminal.getvalue()
    silent = load.io.StringIO()
    monkeypatch.setattr(sys, "stderr", silent)
    call()
    assert silent.getvalue() == ""


def test_the_table_has_a_line_for_every_load(load):
    row = load.Load("store", "steps", 1000, 1.5, 0.25, 3.0, True, 0.5, 0.75)
    text = load.table([row, load.Load("probe", "sequences", 10, 1.0, 0.0, 1.0, False)])
    assert len(text.splitlines()) == 4
    assert "| store | 1,000 steps | 1.5 | 0.25 | 3 | yes | 0.50 s (0.75 s on the clock) |" in text
    assert "| no | – |" in text
