"""Unfinished files and folders: beside the place that they take when they are whole, or removed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from preln.base.faults import writing

PART = ".part"  # how the name of an unfinished file or folder ends
_FORMER = ".old"  # and that of a folder which is being replaced
# paths that this process will remove or rename, its number, and how each is removed
_unfinished: dict[Path, tuple[int, Callable[[Path], object]]] = {}
_whole: set[Path] = set()  # folders that took their place in this process


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well.

    Raises:
        InputError: The disk is full or read-only; ``path`` is then as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_parts(path)
        temporary = part_of(path)
        with noted(temporary):  # before it is there: an interrupt may come right after
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            # it was private until now; a result is as readable as any file that the user creates
            temporary.chmod(0o666 & ~umask())
            os.replace(temporary, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def noted(temporary: Path, remove: Callable[[Path], object] = _remove) -> Iterator[None]:
    """Remove a temporary file or folder when the block ends, or when :func:`abandon` is called before."""
    _unfinished[temporary] = (os.getpid(), remove)
    try:
        yield
    finally:
        remove(temporary)
        _unfinished.pop(temporary, None)


def abandon() -> None:
    """Remove what this process is writing, for one that ends at once; whole files and folders stay."""
    for path, (owner, remove) in list(_unfinished.items()):
        if owner == os.getpid():  # not what the process that this one was forked from is writing
            with contextlib.suppress(OSError):
                remove(path)


def part_prefix(path: Path, process: int | None = None) -> str:
    """How the names of unfinished files of ``path`` begin, which a process of this machine writes."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{path.name}.{machine}-{os.getpid() if process is None else process}-"


def part_of(path: Path) -> Path:
    """A name beside ``path`` for what this process is going to write."""
    return path.parent / f"{part_prefix(path)}{secrets.token_hex(4)}{PART}"


def clear_parts(path: Path) -> None:
    """Remove what processes of this machine that are no more left unfinished beside ``path``.

    A folder that one of them was about to replace takes its place again, where nothing has taken it.
    """
    common = part_prefix(path, 0).removesuffix("0-")
    for stale in path.parent.iterdir():
        owner = stale.name.removeprefix(common).partition("-")[0]
        if not stale.name.startswith(common) or not stale.name.endswith((PART, _FORMER)) or _runs(owner):
            continue
        if stale.name.endswith(_FORMER) and not path.exists():
            os.replace(stale, path)
        else:
            _remove(stale)


def _runs(process: str) -> bool:
    """Whether a process of this number exists here."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def umask() -> int:
    """The process's umask, which the operating system only tells by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a folder took its place in this process, so that nothing is left to write into it."""
    return Path(path).absolute() in _whole and Path(path).exists()


def take_place(temporary: Path, target: Path) -> None:
    """Rename a folder to ``target``; what was there is gone only when it is whole."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        _whole.add(target.absolute())  # before, since an interrupt may come right after
        os.replace(temporary, target)  # also over an empty folder
        return
    former = temporary.with_suffix(_FORMER)
    try:
        os.replace(target, former)
        os.replace(temporary, target)
    finally:
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
        elif former.exists():
            os.replace(former, target)
