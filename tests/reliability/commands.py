"""Every verb that writes, on a tiny model, and how to run one in a fork, which begins at once."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from preln import cli
from preln.base.files import hash_tree

MODEL = "tiny:llama:3"
HANGS_S = 300.0  # a command that has not ended by then never will
VERBS = ("probe", "score", "prune", "heal", "evaluate", "run", "report")
# what says when, where and how long, and so differs between equal runs
_TIMED = ("step.json", "manifest.json", "checksums.json", "training.parquet", "README.md", "index.html")
_TIMES = ("seconds", "peak_memory_bytes", "forward_seconds_per_token")


@dataclass
class Ended:
    """How a process ended: its exit code, or minus the signal, and what it said."""

    code: int
    out: str
    errors: str


def corpus(folder: Path) -> Path:
    """A small text to measure on."""
    path = folder / "text.jsonl"
    rows = [{"text": f"block {i} reads the stream and writes its update {i * i}. " * 4} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def study(folder: Path) -> Path:
    """A study with a probe, a pruned and a healed model."""

    def tokens(split: str) -> dict[str, object]:
        return {"source": str(folder / "text.jsonl"), "sequences": 4, "length": 16, "split": split, "seed": 1}

    data = dict.fromkeys(("calibration", "healing"), tokens("train"))
    data |= dict.fromkeys(("evaluation", "healing_validation"), tokens("validation"))
    heal = {
        "recipe": "partial-1",
        "models": ["reverse-1"],
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 1,
    }
    values = {
        **{"name": "faults", "question": "does it last?", "model": MODEL, "theory": "none", "data": data},
        "prune": {"metrics": ["reverse", "block_influence"], "drop": [1]},
        "heal": [heal | {"learning_rate": 1e-3}],
        "hypotheses": [
            {"id": "HYP-LAST", "statistic": "last_minus_worst_deep", "direction": "above", "threshold": 0.0}
        ],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def commands(folder: Path) -> dict[str, list[str]]:
    """The words of every verb; the folder holds the corpus, a study and, for the report, a finished run."""
    data = ["--data", str(folder / "text.jsonl"), "--sequences", "4", "--length", "16"]
    heal = ["--recipe", "partial-1", "--steps", "4", "--batch-size", "2", "--checkpoint-every", "1"]
    return {
        "probe": ["probe", MODEL, *data],
        "score": ["score", MODEL, *data, "--metrics", "block_influence,perplexity"],
        "prune": ["prune", MODEL, *data, "--metric", "block_influence", "--drop", "1"],
        "heal": ["heal", MODEL, *data, *heal, "--validation-sequences", "2"],
        "evaluate": ["evaluate", MODEL, *data],
        "run": ["run", str(folder / "study.yaml")],
        "report": ["report", str(folder / "run")],
    }


def results(out: Path) -> dict[str, object]:
    """What a command wrote, apart from times and provenance."""
    found: dict[str, object] = {
        name: digest
        for name, digest in hash_tree(out).items()
        if not name.startswith(".") and not name.endswith((*_TIMED, "result.json"))
    }
    for path in out.glob("*/result.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        found[str(path.relative_to(out))] = {k: v for k, v in values.items() if k not in _TIMES}
    return found


def unfinished(folder: Path) -> list[str]:
    """Whatever was begun and not finished below a folder: parts, folders being replaced, locks."""
    return [
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".part", ".old", ".lock"))
    ]


def one_line(errors: str) -> str:
    """The one line of the program on stderr, behind the progress of a study; no traceback is there."""
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    lines = [line for line in errors.splitlines() if line.startswith("preln: ")]
    assert len(lines) == 1, errors
    assert errors.strip().splitlines()[-1] == lines[0]
    return lines[0]


class Process:
    """A command in a fork of this process, which has imported everything: it begins at once.

    Args:
        words: Arguments of ``preln``.
        folder: For what it says.
        first: Called in the fork before the command.
    """

    def __init__(self, words: list[str], folder: Path, first: Callable[[], object] = lambda: None) -> None:
        self._said = (folder / f"out-{time.monotonic_ns()}", folder / f"errors-{time.monotonic_ns()}")
        # an interrupt waits for the program, and does not reach this scaffold
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads
            self.number = os.fork()
        if not self.number:
            self._carry_out(words, first)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def _carry_out(self, words: list[str], first: Callable[[], object]) -> None:
        code = 120
        try:
            for place, path in zip((1, 2), self._said, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), place)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            faulthandler.register(signal.SIGUSR1)  # asked for where it hangs
            tqdm.set_lock(threading.RLock())  # its usual one is shared by forks: killed with it, none goes on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["preln", *words]
            original = cli.taken

            def taken(number: int, pressed: list[bool]) -> None:
                original(number, pressed)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

            cli.taken = taken
            first()
            code = cli.main()
            sys.stdout.flush()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def signal(self, number: int) -> bool:
        """Send a signal; False if the process has ended."""
        if os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        os.kill(self.number, number)
        return True

    def wait(self) -> Ended:
        """Wait for its end; a command that hangs is ended, and where it hung stands in its errors."""
        end = time.monotonic() + HANGS_S
        while not (found := os.waitpid(self.number, os.WNOHANG))[0]:
            if time.monotonic() > end:
                for number in (signal.SIGUSR1, signal.SIGKILL):
                    os.kill(self.number, number)
                    time.sleep(1.0)
                end = float("inf")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(found[1])
        out, errors = (p.read_text(encoding="utf-8") if p.exists() else "" for p in self._said)
        for path in self._said:
            path.unlink(missing_ok=True)
        return Ended(code, out, errors)


def carry_out(words: list[str], folder: Path, first: Callable[[], object] = lambda: None) -> Ended:
    """Run a command to its end."""
    return Process(words, folder, first).wait()


class FullDisk:
    """Refuses the n-th opening for writing, making or renaming below a folder, and all that come after it.

    It listens to the interpreter's own audit events, so that no library's writing goes past it but what is
    native; there is one listener a process, for it cannot be taken away.
    """

    def __init__(self) -> None:
        self.left, self.count, self.folder, self.number = -1, 0, "", errno.ENOSPC
        sys.addaudithook(self._listen)

    def _listen(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.folder or event not in ("open", "os.mkdir", "os.rename"):
            return
        name = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(name, str) or not name.startswith(self.folder):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and bool(arguments[2] & os.O_ACCMODE))
        if writes:
            self.count += 1
            if 0 <= self.left < self.count:
                raise OSError(self.number, os.strerror(self.number), name)

    @contextlib.contextmanager
    def after(self, writes: int, folder: Path, number: int = errno.ENOSPC) -> Iterator[FullDisk]:
        """Let so many writes pass; -1 lets all pass and counts them."""
        self.left, self.count, self.folder, self.number = writes, 0, str(folder), number
        try:
            yield self
        finally:
            self.folder = ""
