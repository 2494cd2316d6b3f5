"""Locks of files and of folders that are yet to be made; a process that dies gives them back.

They are the operating system's own (flock): no age of a file and no clock plays a part in them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

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
    target = Path(path)
    while True:
        handle = target.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # the former holder removes the file: whoever waited for it holds a lock that nobody else sees
            if target.exists() and os.path.samestat(os.fstat(handle.fileno()), target.stat()):
                break
        except FileNotFoundError:
            pass
        except BaseException:
            handle.close()
            raise
        handle.close()
    try:
        with noted(target):  # which removes it
            yield
    finally:
        handle.close()


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
