"""A journal of a long command: after a kill what was finished is read back, and what was under way goes on.

A command that is given again takes the same steps in the same order, so a stage is known by its place among
them, and by its name.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.checkpoints import Checkpoints

if TYPE_CHECKING:
    from torch import Tensor

    from preln.base.checkpoints import State

SECONDS = 60.0  # between two saves: at most so much work is lost
Groups = Mapping[str, Mapping[str, "Tensor"]]
_open: ContextVar[Journal | None] = ContextVar("journal", default=None)


class Journal:
    """The stages of one command in one folder, which is made when the first is saved.

    Args:
        directory: Folder of the stages.
        command: Names the command; a journal of another one is refused.
    """

    def __init__(self, directory: str | os.PathLike[str], command: str) -> None:
        self._directory, self._command = Path(directory), command
        self._count = 0
        self._began = self._saved = time.monotonic()

    def stage(self, name: str) -> Stage:
        """The next stage."""
        self._count += 1
        identity = {"arguments, files and versions": self._command, "stage": name}
        folder = self._directory / f"{self._count:06d}"
        return Stage(Checkpoints(folder, identity, within=self._directory), self)

    def due(self, *, last: bool) -> bool:
        """Whether to save: once a minute, and at the end of a stage as soon as there is a minute to lose."""
        return time.monotonic() - (self._began if last else self._saved) > SECONDS

    def save(self, to: Checkpoints, step: int, state: tuple[Mapping[str, Any], Groups]) -> None:
        """Store the state of a stage."""
        to.save(step, *state)
        self._saved = time.monotonic()


class Stage:
    """One stage; without a journal it keeps nothing.

    Args:
        checkpoints: Where its state is stored.
        journal: That it belongs to.
    """

    def __init__(self, checkpoints: Checkpoints | None = None, journal: Journal | None = None) -> None:
        self._checkpoints, self._journal, self._at = checkpoints, journal, 0

    def restore(self) -> State | None:
        """Progress and groups of tensors of the newest save; None where there is none.

        Raises:
            InputError: It is corrupted, or of another command.
        """
        stored = None if self._checkpoints is None else self._checkpoints.latest()
        if stored is None:
            return None
        (progress, groups), self._at = stored, stored[0]["step"]
        return progress["progress"], groups

    def save(self, step: int, state: Callable[[], tuple[Mapping[str, Any], Groups]], *, last: bool) -> None:
        """Store the state if it is time to, and it is not what was restored.

        Args:
            step: How far the stage is, from 1.
            state: Makes plain progress and groups of tensors.
            last: Whether the stage has ended.
        """
        if self._checkpoints is None or self._journal is None or step <= self._at:
            return
        if self._journal.due(last=last):
            progress, groups = state()
            self._journal.save(self._checkpoints, step, ({"step": step, "progress": progress}, groups))


@contextlib.contextmanager
def journalled(directory: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Within the block :func:`next_stage` gives stages that are kept in ``directory``; the caller removes it.

    Args:
        directory: Folder of the journal.
        command: Names what is done in the block, with all that decides about its outcome.
    """
    token = _open.set(Journal(directory, command))
    try:
        yield
    finally:
        _open.reset(token)


def next_stage(name: str) -> Stage:
    """The next stage of the present command's journal, if it keeps one."""
    journal = _open.get()
    return Stage() if journal is None else journal.stage(name)
