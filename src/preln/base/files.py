"""Files that are either whole or absent, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.faults import writing
from preln.base.locks import locked_file as locked_file
from preln.base.staging import clear_parts, noted, part_of, take_place, umask
from preln.base.staging import replacing as _replacing

if TYPE_CHECKING:
    import pandas as pd

CHECKSUMS = "checksums.json"
_maker: ContextVar[tuple[Path, str] | None] = ContextVar("maker", default=None)


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
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number or a nesting without measure
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


def write_checksums(folder: str | os.PathLike[str], *, command: str | None = None) -> Path:
    """Write the SHA-256 of every file below ``folder`` into its ``checksums.json``, and what made them."""
    sums = hash_tree(folder)
    sums.pop(CHECKSUMS, None)
    maker = {} if command is None else {"command": command}
    return write_json(Path(folder) / CHECKSUMS, {"schema_version": 1, **maker, "sha256": sums})


@contextlib.contextmanager
def made_by(path: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Within the block the checksums of the folder ``path`` name the command that makes it."""
    token = _maker.set((Path(path).absolute(), command))
    try:
        yield
    finally:
        _maker.reset(token)


def maker_of(folder: str | os.PathLike[str]) -> str | None:
    """What :func:`made_by` called the command that made a folder; None where its checksums name none."""
    with contextlib.suppress(InputError, OSError):
        listed = read_json(Path(folder) / CHECKSUMS)
        command = listed.get("command") if isinstance(listed, dict) else None
        return command if isinstance(command, str) else None
    return None


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
        InputError: ``path`` exists, is not empty, and ``replace`` is false; it cannot be made; or the disk
            is full or read-only.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, not a folder: name another --out")
    if not replace:
        _check_empty(target)
    temporary = part_of(target)
    with noted(temporary):  # before it is there: an interrupt may come right after
        try:
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                clear_parts(target)
                temporary.mkdir(mode=0o700)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}): name another --out") from error
        try:
            with writing(target):
                temporary.chmod(0o777 & ~umask())
                yield temporary
                if checksums:
                    made, command = _maker.get() or (None, None)
                    write_checksums(temporary, command=command if made == target.absolute() else None)
                if not replace:
                    _check_empty(target)  # nobody else's result is lost
                take_place(temporary, target)
        except InputError as error:
            if str(temporary) not in str(error):
                raise
            raise type(error)(str(error).replace(str(temporary), str(target))) from error


def _check_empty(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target}: the folder is not empty: name another --out or remove it")
