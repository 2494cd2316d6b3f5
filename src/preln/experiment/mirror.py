"""A run that lives at an address such as ``s3://…``: worked on in a local folder, kept there step by step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import sha256_file, staged_directory
from preln.base.packages import cache_dir
from preln.experiment.store import RECORD, SUPERSEDED, RunStore, Step

_HEAD = ("config.yaml", "manifest.json")
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+://")


def open_store(out: str | os.PathLike[str]) -> RunStore:
    """The store of a run: a folder, or an address that fsspec knows.

    Raises:
        InputError: See :class:`MirroredStore`.
    """
    text = os.fspath(out)
    return MirroredStore(text) if _SCHEME.match(text) else RunStore(out)


class MirroredStore(RunStore):
    """A run folder in the cache, whose finished steps are taken from and brought to an address.

    A step is uploaded file by file and ``step.json``, which holds the hashes of all, last: an upload that
    was cut short is never read. What is downloaded is checked against those hashes before it is used.

    Args:
        url: An fsspec address: ``s3://bucket/run``, ``gs://…``, ``file:///…``, ``memory://…``.

    Raises:
        InputError: An unknown protocol, or a missing package for it.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"--out {url}: {error}: install what it needs, or name a folder") from error
        self._base = str(path).rstrip("/")
        name = re.sub(r"[^\w.-]+", "-", posixpath.basename(self._base)) or "run"
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        super().__init__(cache_dir() / "runs" / f"{name}-{key}")

    def open(self) -> None:
        """Take the manifest and the study from the address.

        Raises:
            InputError: It holds something else than a run, or cannot be reached.
        """
        with self._reached():
            there = self._names("")
            if "manifest.json" not in there and any(not name.startswith(".") for name in there - {*_HEAD}):
                raise InputError(f"{self.url}: is not empty and holds no run: name another --out")
            self.root.mkdir(parents=True, exist_ok=True)
            for name in _HEAD:
                if name in there:
                    self._files.get_file(self._at(name), str(self.root / f".{name}.part"))
                    os.replace(self.root / f".{name}.part", self.root / name)

    def publish(self, name: str) -> None:
        """Upload a file of the run folder itself."""
        with self._reached():
            self._files.makedirs(self._base, exist_ok=True)
            self._put(self.root / name, name)

    def gather(self, step_ids: Iterable[str]) -> None:
        """Take finished steps from the address unless they are here.

        Raises:
            InputError: One is not finished there, or a file was changed or lost.
        """
        for step_id in step_ids:
            there = self._record(step_id)
            if there is None:
                raise InputError(f"{self.url}: step {step_id} is not finished: run the study again")
            if there != self.record(step_id):
                self._pull(step_id, there)
            self.verified(step_id)

    def is_finished(self, step: Step) -> bool:
        """Whether the step's result is here or at the address, for exactly these inputs; then it is at both.

        Raises:
            InputError: A stored file was changed or lost, here or there.
        """
        there = self._record(step.id)
        if self.is_here(step):
            if there != self.record(step.id):
                self._push(step.id, there)
            return True
        if there is None or there["inputs_hash"] != self.inputs_hash(step):
            return False
        self._pull(step.id, there)
        return True

    def execute(self, step: Step) -> float:
        """Run a step, store its result here and bring it to the address."""
        seconds = super().execute(step)
        self._push(step.id, self._record(step.id))
        return seconds

    def listed(self) -> RunStore:
        """The records at the address, for questions that need no files."""
        return _Listed(self)

    def _record(self, step_id: str) -> dict[str, Any] | None:
        with self._reached():
            try:
                content = self._files.cat_file(self._at(step_id, RECORD))
            except FileNotFoundError:
                return None
        place = f"{self.url}/{step_id}/{RECORD}"
        try:
            record = json.loads(content)
            names, _ = list(dict(record["files"])), record["inputs_hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{place}: not a record: remove {self.url}/{step_id}") from error
        for name in names:
            if posixpath.isabs(name) or ".." in name.split("/") or "\\" in name:
                raise InputError(f"{place}: {name!r} leaves its folder: remove {self.url}/{step_id}")
        return record

    def _pull(self, step_id: str, record: dict[str, Any]) -> None:
        with self.claimed(step_id):
            if self.record(step_id) == record:
                return
            self._set_aside(step_id)
            with staged_directory(self.root / step_id) as folder:
                for name, expected in record["files"].items():
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._take(step_id, name, target)
                    if sha256_file(target) != expected:
                        self._damaged(step_id, name, "was changed")
                self._take(step_id, RECORD, folder / RECORD)

    def _take(self, step_id: str, name: str, target: Path) -> None:
        with self._reached():
            try:
                self._files.get_file(self._at(step_id, name), str(target))
            except FileNotFoundError:
                self._damaged(step_id, name, "is missing")

    def _damaged(self, step_id: str, name: str, state: str) -> None:
        raise InputError(
            f"{self.url}/{step_id}/{name}: {state} since it was written: "
            f"remove {self.url}/{step_id} and run the study again"
        )

    def _push(self, step_id: str, there: dict[str, Any] | None) -> None:
        """Bring a finished step to the address; another result that stands there is set aside first."""
        record = self.verified(step_id)
        if there == record:
            return
        with self._reached():
            if there is not None:
                aside = posixpath.join(SUPERSEDED, f"{step_id}-{there['inputs_hash'][:12]}")
                for name in [*there["files"], RECORD]:
                    if self._files.exists(self._at(step_id, name)):
                        self._parent(aside, name)
                        self._files.copy(self._at(step_id, name), self._at(aside, name))
                self._files.rm_file(self._at(step_id, RECORD))
            if self._files.exists(self._at(step_id)):
                self._files.rm(self._at(step_id), recursive=True)
            for name in [*record["files"], RECORD]:
                self._parent(step_id, name)
                self._put(self.root / step_id / name, step_id, name)

    def _put(self, source: Path, *names: str) -> None:
        """Upload a file under another name, then give it its own: a reader sees all of it or nothing."""
        target = self._at(*names)
        folder, name = posixpath.split(target)
        self._files.put_file(str(source), f"{folder}/.{name}.part")
        self._files.mv(f"{folder}/.{name}.part", target)

    def _parent(self, *names: str) -> None:
        self._files.makedirs(posixpath.dirname(self._at(*names)), exist_ok=True)

    def _at(self, *names: str) -> str:
        return posixpath.join(self._base, *names)

    def _names(self, below: str) -> set[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._at(below)):
            return set()
        return {
            posixpath.basename(path.rstrip("/")) for path in self._files.ls(self._at(below), detail=False)
        }

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what a file system raises into one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # every protocol has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.url}: {reason}: check the address and your rights there") from error


class _Listed(RunStore):
    """Says what is finished by the records at an address; takes no file."""

    def __init__(self, mirror: MirroredStore) -> None:
        super().__init__(mirror.root)
        self._mirror = mirror

    def record(self, step_id: str) -> dict[str, Any] | None:
        """The record of a finished step at the address, or None."""
        return self._mirror._record(step_id)

    def is_finished(self, step: Step) -> bool:
        """Whether a result for exactly these inputs is at the address."""
        record = self.record(step.id)
        return record is not None and record["inputs_hash"] == self.inputs_hash(step)
