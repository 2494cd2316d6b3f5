"""Files that are either whole or absent, and their hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

CHECKSUMS = "checksums.json"
PART = ".part"  # how the name of an unfinished file or folder ends


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_parts(path)
    handle, name = tempfile.mkstemp(prefix=_part_prefix(path), suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; a result is as readable as any file that the user creates
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _part_prefix(path: Path, process: int | None = None) -> str:
    """How the names of unfinished files of ``path`` begin, which a process of this machine writes."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{path.name}.{machine}-{os.getpid() if process is None else process}-"


def _clear_parts(path: Path) -> None:
    """Remove what processes of this machine that are no more left unfinished beside ``path``."""
    common = _part_prefix(path, 0).removesuffix("0-")
    for stale in path.parent.iterdir():
        owner = stale.name.removeprefix(common).partition("-")[0]
        if stale.name.startswith(common) and stale.name.endswith(PART) and not _runs(owner):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this number exists here."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    """The process's umask, which the operating system only tells by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text so that a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    with _replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes so that a reader sees the old file or the whole new one, never a part."""
    target = Path(path)
    with _replacing(target) as temporary:
        temporary.write_bytes(content)
    return target


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as JSON, atomically; NaN and infinities are refused, for JSON has none.

    Raises:
        InputError: The value holds a non-finite number.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{Path(path).name}: a value is not finite and cannot be stored: {error}") from error
    return write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file is missing, or is not JSON.
    """
    source = Path(path)
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not a JSON file ({error}); make it again") from error


def write_parquet(path: str | os.PathLike[str], frame: pd.DataFrame) -> Path:
    """Write a table as Parquet, atomically and without an index."""
    target = Path(path)
    with _replacing(target) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")
    return target


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tree(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by relative POSIX path, sorted."""
    root = Path(folder)
    return {
        file.relative_to(root).as_posix(): sha256_file(file)
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def write_checksums(folder: str | os.PathLike[str]) -> Path:
    """Write the SHA-256 of every file below ``folder`` into its ``checksums.json``."""
    sums = hash_tree(folder)
    sums.pop(CHECKSUMS, None)
    return write_json(Path(folder) / CHECKSUMS, {"schema_version": 1, "sha256": sums})


def verify_checksums(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds ``checksums.json``, whose files are then all there and unchanged.

    Files that it does not list, and a README, which is there to be edited, are not looked at.

    Raises:
        InputError: A listed file is missing or was changed, or the list itself is no such list.
    """
    root = Path(folder)
    if not (root / CHECKSUMS).is_file():
        return False
    listed = read_json(root / CHECKSUMS)
    sums = listed.get("sha256") if isinstance(listed, dict) else None
    if not isinstance(sums, dict):
        raise InputError(f"{root / CHECKSUMS}: lists no SHA-256: get the folder again, or remove this file")
    for name, expected in sums.items():
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise InputError(f"{root / CHECKSUMS}: lists {name!r}, which lies outside the folder")
        if name == "README.md":
            continue
        if not path.is_file() or sha256_file(path) != expected:
            state = "was changed since it was written" if path.is_file() else "is missing"
            mend = f"get the folder again, or remove {CHECKSUMS} if the change was yours"
            raise InputError(f"{root / name}: {state}: {mend}")
    return True


@contextlib.contextmanager
def staged_directory(
    path: str | os.PathLike[str], *, replace: bool = False, checksums: bool = False
) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` when the block ends well.

    A block that raises, or a process that dies, leaves ``path`` as it was: absent, or the former folder.

    Args:
        path: The folder to make.
        replace: Whether an existing, non-empty ``path`` may be replaced.
        checksums: Whether ``checksums.json`` is added, see :func:`write_checksums`.

    Raises:
        InputError: ``path`` exists, is not empty, and ``replace`` is false; or cannot be made.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, not a folder: name another --out")
    if not replace and target.exists() and any(target.iterdir()):
        raise InputError(f"{target}: the folder is not empty: name another --out or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_parts(target)
        temporary = Path(tempfile.mkdtemp(prefix=_part_prefix(target), suffix=PART, dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): name another --out") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if checksums:
            write_checksums(temporary)
        if target.exists():
            former = temporary.with_suffix(".old")
            os.replace(target, former)
            os.replace(temporary, target)
            shutil.rmtree(former)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        yield
    finally:
        target.unlink(missing_ok=True)
        handle.close()
