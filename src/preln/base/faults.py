"""What a machine refuses: a disk that is full or read-only, memory that ran out. Each told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from preln.base.errors import InputError

_FULL = "make room and run the same command again, or name another --out"
_CLOSED = "name another --out"
# errors of a disk, and what to do about each
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit on a file's size (ulimit -f) and run the same command again",
    errno.EIO: "the disk failed: check it, or name another --out",
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
}
_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # these come of writing alone
# libraries in Rust and C++ say the number in words: "(os error 28)", "[Errno 28]"
_NUMBER = re.compile(r"\((?:os|OS) error (\d+)\)|\[[Ee]rrno (\d+)\]")
_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|not enough memory|ALLOC_FAILED|bad[ _]alloc|Cannot allocate memory"
)
_AMOUNT = re.compile(r"(?:[Tt]ried|[Uu]nable|[Ff]ailed) to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]i?B)?")


def disk_fault(error: BaseException) -> int | None:
    """The error number of a disk that refused a write, also where a library wrapped it; None otherwise.

    >>> disk_fault(RuntimeError("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    True
    >>> disk_fault(ValueError("28"))
    """
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else None
        if number is None and (match := _NUMBER.search(str(found))):
            number = int(match[1] or match[2])
        if number in _DISK:
            return number
        found = found.__cause__
    return None


def disk_line(number: int, path: str | os.PathLike[str]) -> str:
    """The line for an error number of :func:`disk_fault`.

    >>> disk_line(errno.EROFS, "out")
    'out: cannot be written (Read-only file system): name another --out'
    """
    return f"{os.fspath(path)}: cannot be written ({os.strerror(number)}): {_DISK[number]}"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what a disk refuses inside the block as one line that names the file and the mend.

    Args:
        path: What is being written; the error's own file name comes first, where it has one.

    Raises:
        InputError: In place of an error of the disk; every other error passes.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = disk_fault(error)
        # what refuses an input for a reason of its own, such as a file that may not be read, says it better
        if number is None or (isinstance(error, InputError) and number not in _WRITES):
            raise
        raise DiskError(disk_line(number, _named(error, path))) from error


def _named(error: Exception, path: str | os.PathLike[str]) -> str:
    """The file of an error, or ``path``: also where the error names the unfinished file that was to be it."""
    name = error.filename if isinstance(error, OSError) else None
    text = os.fsdecode(name) if isinstance(name, str | bytes) else ""
    return text if text and not os.path.basename(text).startswith(f".{Path(path).name}.") else os.fspath(path)


class DiskError(InputError):
    """A disk refused a write."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of this process, of numpy, of torch on the CPU or on a GPU.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, InputError):
        return False  # it says so itself, and its mend
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def memory_line(error: BaseException, who: str, mend: str) -> str:
    """One line for memory that ran out: who needed it, how much at once if that is known, and the mend.

    >>> memory_line(RuntimeError("you tried to allocate 4000000000 bytes."), "step probe", "shorten it")
    'step probe: memory ran out, 3.73 GiB more were asked for: shorten it'
    """
    match = _AMOUNT.search(str(error))
    amount = f", {_readable(float(match[1]), match[2])} more were asked for" if match else ""
    return f"{who}: memory ran out{amount}: {mend}"


def _readable(size: float, unit: str | None) -> str:
    if unit not in (None, "bytes"):
        return f"{size:g} {unit}"
    for name, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {name}"
    return f"{size:.0f} bytes"


def environment_line(error: OSError, who: str) -> str:
    """The line for any other error of the operating system that reached the top, such as a name too long."""
    named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    if (number := disk_fault(error)) is not None:
        return disk_line(number, named or who)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{named or who}: {reason}: check the path, its folder and its permissions"
