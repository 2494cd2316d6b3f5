"""Load: memory stays flat, progress shows, and a store of many steps still opens at once.

Run `python benchmarks/load.py [--loads store probe rows] [--steps 1000] [--sequences 10000] [--rows 100000]
[--json]`. Trivial steps go through the real store; token windows through the probe of a tiny model; a file of
Alpaca rows is read, with a limit and whole, and a tiny model trains on it. Resident memory is read while each
goes on: growth is what it rises by from a tenth of the way to the end, a thousand steps, sequences or rows.
The peak beside it also counts what is only held for a moment.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from preln.base.files import write_json
from preln.base.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
MIB = 1 << 20
ENTRIES = 50  # of the trivial steps' own files
WORDS = (
    "the",
    "block",
    "reads",
    "what",
    "a",
    "stream",
    "holds",
    "and",
    "writes",
    "an",
    "update",
    "into",
    "it",
)


@dataclass
class Load:
    """What one load came to.

    Attributes:
        what: Its name.
        unit: What is counted.
        count: How many.
        seconds: It took.
        growth_mib: Rise of resident memory a thousand units, from a tenth of the way to the end.
        peak_mib: The most that was resident above the beginning.
        progress: Whether a terminal saw progress.
        open_seconds: Of processor time, to find every step of a full store kept.
        open_wall_seconds: The same on the clock, which counts what else the machine does.
    """

    what: str
    unit: str
    count: int
    seconds: float
    growth_mib: float
    peak_mib: float
    progress: bool
    open_seconds: float | None = None
    open_wall_seconds: float | None = None


@dataclass
class Watch:
    """Resident memory as work goes on.

    Attributes:
        seen: (units done, resident bytes).
    """

    seen: list[tuple[int, int]] = field(default_factory=list)

    def note(self, done: int) -> None:
        """Take down where the work stands and what is resident now."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.seen.append((done, resident))

    def growth(self, count: int) -> float:
        """MiB a thousand units, between the first note past a tenth of the count and the last one."""
        (first, low), (last, high) = next(s for s in self.seen if s[0] >= count / 10), self.seen[-1]
        return (high - low) / MIB / max(1, last - first) * 1000


class Terminal(io.StringIO):
    """A stream that says it is a terminal and keeps what it is told."""

    def isatty(self) -> bool:
        """True."""
        return True


@contextmanager
def measured(what: str, unit: str, count: int) -> Iterator[tuple[Watch, Callable[[], Load]]]:
    """Watch a block of work; the second thing yielded makes its result once the block has ended."""
    watch, terminal, ended = Watch(), Terminal(), {}
    reset_peak(CPU)
    watch.note(0)
    begin = watch.seen[0][1]

    def result() -> Load:
        rise = (ended["peak"] - begin) / MIB
        growth = watch.growth(count)
        return Load(what, unit, count, ended["seconds"], growth, rise, bool(terminal.getvalue().strip()))

    start = time.perf_counter()
    with redirect_stderr(terminal):
        yield watch, result
    ended.update(seconds=time.perf_counter() - start, peak=peak_bytes(CPU))


def store(count: int, folder: Path) -> Load:
    """Trivial steps, each needing the one before, and a full store opened anew."""
    from preln.experiment.engines import LOCAL, run_steps
    from preln.experiment.store import RunStore, Step

    held, lab = RunStore(folder), SimpleNamespace(store=RunStore(folder))
    with held.locked(), measured("store", "steps", count) as (watch, result):

        def work(number: int) -> Callable[[Path, Path], None]:
            def fill(place: Path, _: Path) -> None:
                write_json(place / "numbers.json", [number * k for k in range(ENTRIES)])
                if number % max(1, count // 20) == 0:
                    watch.note(number)

            return fill

        steps = [
            Step(f"step-{k}", "trivial", {"number": k}, (f"step-{k - 1}",) if k else (), work(k))
            for k in range(count)
        ]
        ran = run_steps(steps, lab, folder, LOCAL)  # pyright: ignore
        watch.note(count)
    assert len(ran) == count
    again, found = RunStore(folder), result()
    processor, wall = time.process_time(), time.perf_counter()
    assert all(again.is_finished(step) for step in steps)
    found.open_seconds, found.open_wall_seconds = time.process_time() - processor, time.perf_counter() - wall
    return found


def probe(count: int, length: int = 16) -> Load:
    """Token windows through the probe of a tiny model, with the measures that it takes by default.

    What is kept of a window is its sums, so that growth should not depend on ``length``.
    """
    from preln.models import load_model
    from preln.probe import probe_tables

    model, _ = load_model("tiny:llama:2")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (count, length), generator=generator)
    probe_tables(model, ids[:8])  # what is loaded once is not growth
    done = 0
    with measured(f"probe, {length} tokens each", "sequences", count) as (watch, result):

        def seen(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal done
            done += len(inputs[0])
            if done % max(8, count // 20) < 8:
                watch.note(done)

        hook = model.get_input_embeddings().register_forward_pre_hook(seen)
        try:
            tables = probe_tables(model, ids, batch_size=8)
        finally:
            hook.remove()
    assert int(tables.layers["n"].max()) >= count
    return result()


def write_rows(path: Path, count: int) -> None:
    """A file of distinct Alpaca rows, a hundred to five hundred characters each."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with path.open("w", encoding="utf-8") as target:
        for number in range(count):
            row = {"instruction": f"{number}: {words(5, 20)}", "input": "", "output": words(10, 70)}
            target.write(json.dumps(row) + "\n")


def rows(count: int, folder: Path) -> list[Load]:
    """A file of rows read with a limit, read whole, and trained on for a few steps."""
    from preln.data import load_rows
    from preln.heal import heal_model
    from preln.models import load_model

    path = folder / "rows.jsonl"
    write_rows(path, count)
    found = []
    for what, limit in (("rows, limit 1,000", 1000), ("rows, all held", None)):
        with measured(what, "rows", count) as (watch, result):
            kept = _watched_rows(load_rows, path, limit, watch, count)
        found.append(result())
    model, tokenizer = load_model("tiny:llama:2")
    with measured("rows, packed and trained on", "rows", count) as (watch, result):
        watch.note(count // 10)
        settings = {"steps": 4, "batch_size": 8, "cache": None}
        healed = heal_model(model, kept, "head", tokenizer=tokenizer, **settings)
        watch.note(count)
    assert healed.manifest["steps"] == 4
    last = result()
    last.growth_mib = last.peak_mib / count * 1000  # the tokens of all rows are held at once
    return [*found, last]


def _watched_rows(read: Callable[..., Any], path: Path, limit: int | None, watch: Watch, count: int) -> Any:
    """Read rows, taking down memory every twentieth of the file."""
    from preln.data import rows as module

    honest, done = module.checked_row, 0

    def counted(row: Any, where: str) -> Any:
        nonlocal done
        done += 1
        if done % max(1, count // 20) == 0:
            watch.note(done)
        return honest(row, where)

    module.checked_row = counted
    try:
        return read(path, limit=limit)
    finally:
        module.checked_row = honest


def table(found: list[Load]) -> str:
    """The loads as a Markdown table."""
    head = (
        "| load | size | seconds | growth, MiB a thousand | peak above the start, MiB | progress | opens in |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for load in found:
        opens = "–"
        if load.open_seconds is not None:
            opens = f"{load.open_seconds:.2f} s ({load.open_wall_seconds or 0.0:.2f} s on the clock)"
        size = f"{load.count:,} {load.unit}"
        numbers = f"{load.seconds:.1f} | {load.growth_mib:.2f} | {load.peak_mib:.0f}"
        lines.append(f"| {load.what} | {size} | {numbers} | {'yes' if load.progress else 'no'} | {opens} |")
    return "\n".join(lines)


def main() -> int:
    """Carry the loads, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loads", nargs="+", default=["store", "probe", "rows"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        calls: dict[str, Callable[[], list[Load]]] = {
            "store": lambda: [store(arguments.steps, Path(name) / "run")],
            "probe": lambda: [probe(arguments.sequences, length) for length in (16, 64)],
            "rows": lambda: rows(arguments.rows, Path(name)),
        }
        found = [load for chosen in arguments.loads for load in calls[chosen]()]
    print(json.dumps([vars(load) for load in found]) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
