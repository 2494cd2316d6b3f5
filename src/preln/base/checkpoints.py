"""Checkpoints of a run in progress: whole or absent, verified by hash, safe to read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.files import read_json, sha256_file, staged_directory, write_json

if TYPE_CHECKING:
    from torch import Tensor

State = tuple[dict[str, Any], dict[str, dict[str, "Tensor"]]]  # plain progress, and groups of tensors
_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run in one folder; only the newest is kept.

    Args:
        directory: Folder of the run's checkpoints, made when the first is saved.
        identity: What must be equal for a run to continue: settings, fingerprints. Plain data.
        within: What to remove to start anew, where that is more than ``directory``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        within: str | os.PathLike[str] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._whole = Path(within or directory)
        self.identity = json.loads(json.dumps(identity))

    def save(
        self, step: int, progress: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Store a checkpoint, then remove the older ones.

        A kill at any moment leaves the former checkpoint, the new one, or both.

        Args:
            step: Where the run stands; a later checkpoint has a higher one.
            progress: Plain data.
            groups: Named groups of named tensors, one file each.
        """
        from safetensors.torch import save_file

        target = self.directory / f"step-{step:08d}"
        with staged_directory(target, replace=True) as staged:
            hashes = {}
            for name, group in groups.items():
                file = staged / f"{name}.safetensors"
                save_file(dict(group), file)
                hashes[file.name] = sha256_file(file)
            state = {"identity": self.identity, "progress": progress, "files": hashes}
            write_json(staged / "state.json", {"sha256": _digest(state), "state": state})
        self._remove_all_but(target)

    def latest(self) -> State | None:
        """Progress and groups of tensors of the newest checkpoint; None where there is none.

        Raises:
            InputError: It is corrupted, or belongs to a run with another recipe, settings, model or data.
        """
        from safetensors.torch import load_file

        folders = self._folders()
        if not folders:
            return None
        newest = folders[-1]
        file = newest / "state.json"
        content = read_json(file)
        if not isinstance(content, dict) or content.get("sha256") != _digest(content.get("state")):
            raise InputError(_corrupted(file, self._whole))
        state = content["state"]
        for key in sorted(self.identity.keys() | state["identity"].keys()):
            mine, stored = self.identity.get(key), state["identity"].get(key)
            if mine != stored:
                raise InputError(
                    f"{newest}: the checkpoint is of another run ({_difference(key, stored, mine)}): "
                    f"use the same arguments, or remove {self._whole} to start anew"
                )
        groups = {}
        for name, digest in state["files"].items():
            file = newest / name
            if not file.is_file() or sha256_file(file) != digest:
                raise InputError(_corrupted(file, self._whole))
            groups[file.stem] = load_file(file)
        return state["progress"], groups

    def clear(self) -> None:
        """Remove the folder with all checkpoints."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(folder for folder in self.directory.iterdir() if _NAME.fullmatch(folder.name))

    def _remove_all_but(self, kept: Path) -> None:
        # also what a kill left half-staged, or half-removed
        for entry in self.directory.iterdir():
            if entry != kept and (_NAME.fullmatch(entry.name) or entry.name.startswith(".step-")):
                shutil.rmtree(entry, ignore_errors=True)


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _corrupted(file: Path, directory: Path) -> str:
    return f"{file}: the checkpoint is corrupted (its SHA-256 differs): remove {directory} to start anew"


def _difference(key: str, stored: Any, mine: Any) -> str:
    """Names the first field that differs, with both values."""
    if isinstance(stored, dict) and isinstance(mine, dict):
        for name in sorted(stored.keys() | mine.keys()):
            if stored.get(name) != mine.get(name):
                return f"{name} was {stored.get(name)!r}, now {mine.get(name)!r}"
    return f"{key} was {str(stored)[:40]!r}, now {str(mine)[:40]!r}"
