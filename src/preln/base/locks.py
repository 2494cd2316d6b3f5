"""Locks of files and of folders that are yet to be made; a process that dies gives them back.

They are the operating system's own (flock): no age of a file and no clock plays a part in them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from preln.base.errors import InputError
from preln.base.faults import writing
from preln.base.staging import noted

_LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system without locks answers


@contextlib.contextmanager
def locked_file(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that one process at a time can have; a process that dies gives it back.

    The file is there while the lock is held or waited for, and removed afterwards.

    Args:
        path: The lock's file, in a folder that exists.
        wait: Whether to wait for another holder.

    Raises:
        BlockingIOError: Somebody else holds it, and ``wait`` is false.
        OSError: The file cannot be made, or its file system has no locks.
    """
    target, lock = Path(path), _Lock()
    with noted(target, lock.give_back):  # before it is there: an interrupt may come right after
        lock.take(target, wait)
        yield


@dataclass
class _Lock:
    """A lock's file, open or not, held or not."""

    handle: IO[str] | None = None
    held: bool = False

    def take(self, target: Path, wait: bool) -> None:
        """Open the file and hold it."""
        while not self.held:
            self.handle = target.open("a+")
            fcntl.flock(self.handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.held = self._is(target)
            if not self.held:
                self.handle.close()

    def give_back(self, target: Path) -> None:
        """Remove the file, unless somebody else holds it, and close it."""
        if self.held:
            target.unlink(missing_ok=True)
        else:  # an interrupt may have come when the file was there for nobody
            self._close()
            with contextlib.suppress(OSError), target.open("r+") as self.handle:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is(target):
                    target.unlink()
        self._close()

    def _is(self, target: Path) -> bool:
        # the former holder removes the file: whoever waited for it holds a lock that nobody else sees
        try:
            return self.handle is not None and os.path.samestat(os.fstat(self.handle.fileno()), target.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self.handle is not None:
            self.handle.close()


@contextlib.contextmanager
def claimed_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the name of a folder that one process at a time may make; the folder itself is not touched.

    The lock is the file ``.<name>.lock`` beside it, there while it is held. Folders above it are made, and
    removed again where they are left empty. A file system without locks is written to without.

    Raises:
        InputError: Another process holds it, or nothing can be written there.
    """
    target = Path(path).resolve()
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        with contextlib.ExitStack() as held:
            try:
                with writing(path):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked_file(target.parent / f".{target.name}.lock", wait=False))
            except BlockingIOError as error:
                raise InputError(
                    f"{path}: another command is writing there: wait for it, or name another --out"
                ) from error
            except OSError as error:
                if error.errno not in _LOCKLESS:
                    raise InputError(
                        f"{path}: cannot be written ({error.strerror}): name another --out"
                    ) from error
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
