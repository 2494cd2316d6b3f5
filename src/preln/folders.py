"""The folder that ``--out`` names: one command at a time makes it, and what it has made is kept."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import made_by, maker_of, verify_checksums
from preln.base.journal import journalled
from preln.base.locks import claimed_folder
from preln.base.provenance import package_versions, source_hash
from preln.base.staging import clear_parts

Outcome = tuple[dict[str, Any], int]
Verb = Callable[[argparse.Namespace], Outcome]
_NOT_ASKED = ("out", "json")  # arguments that do not change a result
_NAMES = ("model", "data", "plan", "teacher", "reference", "against", "source")  # those that may name files
_MOST = 10_000


def makes_folder(again: Callable[[argparse.Namespace], dict[str, Any]]) -> Callable[[Verb], Verb]:
    """A verb that holds the folder which ``--out`` names; before the work it is said if none can be made.

    A folder that the same command has made is kept, after its checksums were compared: a command that was
    killed behind its last write has ended so, whenever it is given again. Of two commands with one ``--out``
    at once the second is refused. Of the processes of a launcher, which work together, the first holds it.

    Args:
        again: Tells the summary of what is stored.

    Raises:
        InputError: Another command is writing there, it is no empty folder and not of this command, a file
            in it was changed, or the disk refuses it.
    """

    def of(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def held(arguments: argparse.Namespace) -> Outcome:
            if not arguments.out:
                return verb(arguments)
            out = arguments.out = plain_path(arguments.out)
            command = command_of(arguments)
            _is_made(out, command)
            first = os.environ.get("RANK", "0") == "0"
            with claimed_folder(out) if first else contextlib.nullcontext():
                if _is_made(out, command):  # perhaps since a moment ago
                    verify_checksums(out)
                    _tidy(out, first)
                    print(f"preln: {out}: kept, for this command has made it", file=sys.stderr)
                    return again(arguments) | {"kept": True}, 0
                journal = journalled(_resume(out), command) if first else contextlib.nullcontext()
                with made_by(out, command), journal:
                    outcome = verb(arguments)
                _tidy(out, first)
                return outcome

        return held

    return of


def plain_path(out: str) -> str:
    """``--out`` without what a name beside it could not be made from: ``.``, ``..``, a link to a folder.

    Raises:
        InputError: The name is not UTF-8, or a link that leads to itself.
    """
    path = Path(out)
    try:
        if path.name in ("", "..") or ".." in path.parts or path.is_symlink():
            path = path.resolve()
    except RuntimeError as error:
        raise InputError(f"--out {out}: is a link to itself: name another, or remove it") from error
    return str(path)


def command_of(arguments: argparse.Namespace) -> str:
    """SHA-256 of what decides about a command's result: its words, the files they name, code and versions.

    A file, and each in a folder, is known by name, size and time of its last change. What a hub holds under
    a name is not looked at.
    """
    told = {name: value for name, value in vars(arguments).items() if name not in _NOT_ASKED}
    named = {name: told.get(name) for name in _NAMES} | {"benchmarks": os.environ.get("PRELN_DATA")}
    made = getattr(arguments, "out", None)
    stamps = {key: _stamps(text, made) for key, text in named.items() if isinstance(text, str) and text}
    asked = {"words": told, "files": stamps, "packages": package_versions(), "code": source_hash()}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _stamps(text: str, made: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of the file that ``text`` names, or of those below the folder; else none.

    What a command makes (``made`` and its like beside it) and hidden files are left out. Of more than 10,000
    files the first count.
    """
    own = str(Path(made).resolve()) if made else "\0"
    for spec in (text, text.rpartition(":")[0]):  # a folder of data may have a configuration behind it
        try:
            path = Path(spec).expanduser()
            if not spec or not path.exists():
                continue
            found = [path] if path.is_file() else itertools.islice(_below(path.resolve(), own), _MOST)
            seen = [(os.path.relpath(file, path.resolve()), file.stat()) for file in found]
        except (OSError, ValueError, RuntimeError):  # no path; the verb says what it makes of it
            continue
        return [(name, state.st_size, state.st_mtime_ns) for name, state in seen]
    return []


def _below(folder: Path, own: str) -> Iterator[Path]:
    """Every file below a folder, in order."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if n[0] != "." and not _is_own(f"{root}/{n}", own))
        yield from (
            Path(root, name)
            for name in sorted(names)
            if name[0] != "." and not _is_own(f"{root}/{name}", own) and Path(root, name).is_file()
        )


def _is_own(path: str, own: str) -> bool:
    return path in (own, f"{own}.resume", f"{own}.log")


def _is_made(out: str, command: str) -> bool:
    """Whether the folder holds what this command has made; false if it is free.

    Raises:
        InputError: It holds something else.
    """
    path = Path(out)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if maker_of(path) != command:
        raise InputError(f"--out {out}: exists and is not an empty folder: name another, or remove it")
    return True


def _tidy(out: str, first: bool) -> None:
    """Remove what the command needed to go on, and what it left unfinished."""
    if first:
        clear_parts(Path(out))
        shutil.rmtree(_resume(out), ignore_errors=True)


def _resume(out: str) -> str:
    """The folder beside ``out`` that holds what a command needs to go on."""
    return f"{out}.resume"
