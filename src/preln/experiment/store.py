"""A run folder: one folder a finished step, never rewritten; an unfinished step leaves nothing to read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.faults import is_out_of_memory, memory_line, writing
from preln.base.files import hash_tree, read_json, staged_directory, write_json
from preln.base.journal import journalled
from preln.base.locks import locked_file

RECORD = "step.json"
SUPERSEDED = ".superseded"
WORK = ".work"
_SMALLER = {  # what makes a kind of step need less memory
    "heal": "lower the batch_size of its entry, or data.healing.length",
    "probe": "lower data.calibration.length, or use a narrower dtype",
    "score": "lower data.calibration.length, or use a narrower dtype",
    "shift": "lower data.calibration.length, or use a narrower dtype",
    "damage": "lower data.evaluation.length, or use a narrower dtype",
    "prune": "lower data.evaluation.length, or use a narrower dtype",
}


@dataclass(frozen=True)
class Step:
    """One unit of work.

    Attributes:
        id: Name of its folder.
        kind: What it does, such as ``probe``.
        inputs: All that its result depends on, as plain data.
        needs: Ids of the steps whose results it reads.
        work: Called with the folder to fill and a folder that survives a kill; returns nothing.
    """

    id: str
    kind: str
    inputs: dict[str, Any]
    needs: tuple[str, ...]
    work: Callable[[Path, Path], None]


def digest(value: Any) -> str:
    """SHA-256 of plain data in canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


_FIELDS = {"inputs_hash": str, "files": dict}  # without which a record is none


class RunStore:
    """The folder of one run.

    Args:
        root: The run folder; made if absent.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def open(self) -> None:
        """Make what is stored under the run's address readable here; a folder is readable as it is."""

    def publish(self, name: str) -> None:
        """Bring a file of the run folder itself to the run's address; a folder is its own."""

    def gather(self, step_ids: Iterable[str]) -> None:
        """Make finished steps readable here, whole and unchanged.

        Raises:
            InputError: One is not finished, or a file was changed or lost.
        """
        for step_id in step_ids:
            self.verified(step_id)

    def record(self, step_id: str) -> dict[str, Any] | None:
        """The record of a finished step, or None."""
        path = self.root / step_id / RECORD
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or any(not isinstance(found.get(k), t) for k, t in _FIELDS.items()):
            raise InputError(f"{path}: is no record of a step: remove {path.parent} and run the study again")
        return found

    def verified(self, step_id: str) -> dict[str, Any]:
        """The record of a finished step whose files still have the hashes written down with them.

        Raises:
            InputError: The step is not finished, or a file was changed or lost.
        """
        record = self.record(step_id)
        if record is None:
            raise InputError(f"{self.root}: step {step_id} is not finished: run the study again")
        found = hash_tree(self.root / step_id)
        found.pop(RECORD, None)
        for name, expected in record["files"].items():
            if found.get(name) != expected:
                state = "is missing" if name not in found else "was changed"
                folder = self.root / step_id
                raise InputError(
                    f"{folder / name}: {state} since it was written: remove {folder} and run the study again"
                )
        return record

    def inputs_hash(self, step: Step) -> str:
        """Hash of a step's inputs and of those of all steps that it needs."""
        needed = {name: (self.record(name) or {}).get("inputs_hash") for name in step.needs}
        return digest({"kind": step.kind, "inputs": step.inputs, "needs": needed})

    def is_finished(self, step: Step) -> bool:
        """Whether the step's result is there for exactly these inputs, whole and unchanged.

        Raises:
            InputError: A stored file was changed or lost.
        """
        return self.is_here(step)

    def is_here(self, step: Step) -> bool:
        """The same of this folder alone, wherever else the run may live."""
        record = self.record(step.id)
        if record is None or record["inputs_hash"] != self.inputs_hash(step):
            return False
        self.verified(step.id)
        return True

    def execute(self, step: Step) -> float:
        """Run a step and store its result; returns the seconds it took.

        A result for other inputs is set aside under ``.superseded``, never changed. Where another process
        works on the same step, this one waits, and takes its result.

        Raises:
            InputError: Whatever the step says; the disk is full or read-only; memory ran out. The step then
                leaves nothing but its workspace, and what was finished before is kept.
        """
        with self.claimed(step.id), writing(self.root / step.id):
            if self.is_here(step):
                return 0.0
            key = self.inputs_hash(step)
            self._set_aside(step.id)
            workspace = self.root / WORK / f"{step.id}-{key[:12]}"
            workspace.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            journal = journalled(workspace / "journal", key)
            with staged_directory(self.root / step.id) as folder, journal:
                _worked(step, folder, workspace)
                seconds = time.perf_counter() - begin
                write_json(
                    folder / RECORD,
                    {
                        "id": step.id,
                        "kind": step.kind,
                        "status": "finished",
                        "seconds": round(seconds, 3),
                        "inputs_hash": key,
                        "inputs": step.inputs,
                        "needs": list(step.needs),
                        "files": hash_tree(folder),
                    },
                )
            _remove_tree(workspace)
            return seconds

    @contextlib.contextmanager
    def claimed(self, step_id: str) -> Iterator[None]:
        """Hold one step, after waiting for whoever else holds it; what a kill left of it is removed."""
        with contextlib.ExitStack() as held:
            with writing(self.root / step_id):
                (self.root / WORK).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked_file(self._lock(step_id)))
            for stale in self.root.glob(".*.part"):
                if _owner(stale) == step_id:
                    _remove_tree(stale)
            yield

    def _lock(self, step_id: str) -> Path:
        return self.root / WORK / f"{step_id}.lock"

    def _set_aside(self, step_id: str) -> None:
        folder, record = self.root / step_id, self.record(step_id)
        if not folder.exists():
            return
        suffix = record["inputs_hash"][:12] if record else "unfinished"
        target = self.root / SUPERSEDED / f"{step_id}-{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            _remove_tree(target)
        os.replace(folder, target)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process; the steps it gives to others are held by those.

        Raises:
            InputError: Another process holds it, or it cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                with writing(self.root):
                    self.root.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked_file(self.root / ".lock", wait=False))
                    (self.root / WORK).mkdir(exist_ok=True)
            except BlockingIOError as error:
                raise InputError(
                    f"{self.root}: another run is writing here: wait, or name another --out"
                ) from error
            except OSError as error:
                raise InputError(
                    f"{self.root}: cannot be written ({error.strerror}): name another --out"
                ) from error
            for stale in self.root.glob(".*.part"):  # what a killed process left behind
                # a worker that outlives the run that sent it still writes: its part is not stale
                with (
                    contextlib.suppress(BlockingIOError),
                    locked_file(self._lock(_owner(stale)), wait=False),
                ):
                    _remove_tree(stale)
            yield


def _worked(step: Step, folder: Path, workspace: Path) -> None:
    """Do a step's work; memory that runs out is told by the step's name."""
    try:
        step.work(folder, workspace)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        mend = _SMALLER.get(step.kind, "use a smaller model or a narrower dtype")
        raise InputError(memory_line(error, f"step {step.id}", mend)) from error


def _owner(part: Path) -> str:
    """What a temporary ``.name.random.part`` is to become.

    >>> _owner(Path(".heal-lora-0.001.x7_a.part"))
    'heal-lora-0.001'
    """
    return part.name.removesuffix(".part").rpartition(".")[0].removeprefix(".")


def _remove_tree(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
