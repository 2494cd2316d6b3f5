"""Kill any command at any moment: the same command goes on, and ends where an undisturbed run ends.

Run `python benchmarks/kills.py [--kills 60] [--model tiny:llama:6] [--json]`. Every command is run once to
its end and timed; then again and again, killed (SIGKILL) at random moments of that time until it has been
killed as often as asked, each time in the folder that the killed one left. What it writes in the end is
compared with the undisturbed run, file by file, bit by bit, apart from times and provenance, and nothing
half-written may be left beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

# what says when, where and how long, and so differs between equal runs
TIMES = {
    *("seconds", "wall_seconds", "start", "end", "peak_memory_bytes", "held_bytes", "created", "duration"),
    *(
        "training_seconds",
        "forward_seconds_per_token",
        "date",
        "total_evaluation_time_seconds",
        "start_time",
        "end_time",
    ),
    *("inputs_hash", "files"),  # of a step: hashes over files with times in them
}
PROVENANCE = {"manifest.json", "step.json", "checksums.json"}
SIZE = ("--data", "docstrings", "--sequences", "8", "--length", "32")


@dataclass
class Command:
    """A command line to kill.

    Attributes:
        verb: Its name in the table.
        words: The arguments behind ``preln``; ``{out}`` and ``{folder}`` are replaced.
    """

    verb: str
    words: Sequence[str]


@dataclass
class Outcome:
    """What happened to one command.

    Attributes:
        verb: Its name.
        kills: How many runs were killed.
        seconds: Of an undisturbed run.
        restarts: How often it was started until all kills were done and it had ended as often as needed.
        kept: Of the starts after a kill, how many found something to go on from.
        differences: Files that differ from the undisturbed run's.
        failures: Starts that ended with an error.
    """

    verb: str
    kills: int = 0
    seconds: float = 0.0
    restarts: int = 0
    kept: int = 0
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def commands(model: str, folder: Path) -> list[Command]:
    """Every verb that writes, on a small model; ``{run}`` of the report is a run made beforehand."""
    small, study = str(folder / "small"), str(folder / "study.yaml")
    heal = ("--recipe", "partial-1", "--steps", "12", "--batch-size", "4", "--checkpoint-every", "2")
    return [
        Command("probe", ("probe", model, *SIZE, "--out", "{out}")),
        Command(
            "score", ("score", model, *SIZE, "--metrics", "block_influence,perplexity,sleb", "--out", "{out}")
        ),
        Command(
            "prune", ("prune", model, *SIZE, "--metric", "block_influence", "--drop", "2", "--out", "{out}")
        ),
        Command("heal", ("heal", small, *SIZE, *heal, "--out", "{out}")),
        Command("evaluate", ("evaluate", model, *SIZE, "--out", "{out}")),
        Command("run", ("run", study, "--out", "{out}")),
        Command("report", ("report", str(folder / "run"), "--out", "{out}")),
    ]


def prepare(model: str, folder: Path) -> None:
    """Make what some commands start from: a pruned model, a study, and a finished run of it."""
    (folder / "study.yaml").write_text(yaml.safe_dump(study(model)), encoding="utf-8")
    finish(("prune", model, "--layers", "3,4", "--out", str(folder / "small")))
    finish(("run", str(folder / "study.yaml"), "--out", str(folder / "run")))


def study(model: str) -> dict[str, Any]:
    """Return a study with every kind of step but the theorems and the tasks."""

    def tokens(split: str, seed: int) -> dict[str, Any]:
        return {"source": "docstrings", "sequences": 8, "length": 32, "split": split, "seed": seed}

    data = {"calibration": tokens("train", 1), "evaluation": tokens("validation", 2)}
    data |= {"healing": tokens("train", 3), "healing_validation": tokens("validation", 4)}
    rule = {"statistic": "loss_gap_to_best", "direction": "below", "threshold": 0.0}
    healing = {"recipe": "partial-1", "models": ["reverse-2"], "seeds": [0, 1], "steps": 8, "batch_size": 4}
    return {
        **{"name": "kills", "question": "does it survive?", "model": model, "theory": "none", "data": data},
        "prune": {"metrics": ["reverse", "block_influence"], "drop": [2], "probe": ["reverse-2"]},
        "heal": [healing | {"checkpoint_every": 2}],
        "hypotheses": [{"id": "HYP-REVERSE-RAW", **rule}],
    }


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "preln.cli", *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def finish(words: Sequence[str]) -> tuple[float, str]:
    """Run a command to its end; seconds, and the last line of its errors where it failed."""
    began = time.perf_counter()
    process = start(words)
    _, errors = process.communicate()
    failed = process.returncode not in (0, 1)
    lines = errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
    return time.perf_counter() - began, lines[-1] if failed else ""


def kill_after(words: Sequence[str], seconds: float) -> bool:
    """Start a command and kill it after so long; False if it had ended by itself."""
    process = start(words)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file's content, times and provenance left out."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in PROVENANCE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _content(path: Path) -> str:
    if path.suffix == ".json":
        plain = json.dumps(_without_times(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
        plain = re.sub(r" at 0x[0-9a-f]+>", ">", plain)  # where an object was in memory
        return hashlib.sha256(plain.encode()).hexdigest()
    if path.suffix in (".parquet", ".csv"):
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        kept = table[[name for name in table.columns if name not in TIMES]]
        return hashlib.sha256(kept.to_csv(index=False, float_format="%.17g").encode()).hexdigest()
    if path.name == "README.md":  # of a healed model
        return hashlib.sha256(re.sub(rb"\| training time \|.*", b"", path.read_bytes())).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def torture(command: Command, kills: int, folder: Path, rng: random.Random) -> Outcome:
    """Kill a command so often, and compare what it writes in the end."""
    found = Outcome(command.verb)
    whole, out = folder / f"{command.verb}-whole", folder / f"{command.verb}-killed"

    def words(target: Path) -> list[str]:
        return [word.replace("{out}", str(target)) for word in command.words]

    found.seconds, error = finish(words(whole))
    if error:
        found.failures.append(f"undisturbed: {error}")
        return found
    expected = contents(whole)
    while found.kills < kills:
        found.restarts += 1
        if kill_after(words(out), rng.uniform(0.0, 1.1 * found.seconds)):
            found.kills += 1
            found.kept += any(folder.glob(f"{out.name}*"))
            continue
        _compare(found, expected, out)  # it ended before its time: begin anew
        _remove(folder, out)
    found.restarts += 1
    _, error = finish(words(out))
    if error:
        found.failures.append(error)
    else:
        _compare(found, expected, out)
    _remove(folder, out)
    return found


def _compare(found: Outcome, expected: dict[str, str], out: Path) -> None:
    if not out.is_dir():
        found.failures.append("ended without a result")
        return
    own = contents(out)
    found.differences += [path.name for path in out.parent.rglob("*.part")]
    found.differences += sorted(
        name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name)
    )


def _remove(folder: Path, out: Path) -> None:
    for path in folder.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    """Torture every command, print the table; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="in all, shared by the commands")
    parser.add_argument("--model", default="tiny:llama:6")
    parser.add_argument("--verbs", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rng, outcomes = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments.model, folder)
        chosen = [c for c in commands(arguments.model, folder) if c.verb in (arguments.verbs or c.verb)]
        for place, command in enumerate(chosen):
            share = arguments.kills // len(chosen) + (place < arguments.kills % len(chosen))
            outcomes.append(torture(command, share, folder, rng))
            if not arguments.json:
                print(vars(outcomes[-1]), flush=True)
    if arguments.json:
        print(json.dumps([vars(outcome) for outcome in outcomes]))
    return int(any(outcome.failures or outcome.differences for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
