"""The folder that ``--out`` names: one command at a time makes it, and what it has made is kept."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import made_by, maker_of, verify_checksums
from preln.base.journal import journalled
from preln.base.locks import claimed_folder
from preln.base.provenance import package_versions
from preln.base.staging import clear_parts

Outcome = tuple[dict[str, Any], int]
Verb = Callable[[argparse.Namespace], Outcome]
_NOT_ASKED = ("out", "json", "given")  # arguments that do not change a result


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
            out = arguments.out
            if not out:
                return verb(arguments)
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


def command_of(arguments: argparse.Namespace) -> str:
    """SHA-256 of what decides about a command's result: its words, the files they name, the versions.

    A file, and each in a folder, is known by name, size and time of its last change.
    """
    words = {name: value for name, value in vars(arguments).items() if name not in _NOT_ASKED}
    texts = [text for value in words.values() for text in (value if isinstance(value, list) else [value])]
    stamps = {text: _stamps(text) for text in texts if isinstance(text, str) and text}
    asked = {"words": words, "files": stamps, "packages": package_versions()}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def _stamps(text: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the file that ``text`` names, or of those in the folder; none of other text."""
    try:
        path = Path(text).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        seen = [(file.name, file.stat()) for file in files if file.is_file() and file.name[0] != "."]
    except (OSError, ValueError, RuntimeError):  # no text of a path; the verb says what it makes of it
        return []
    return [(name, state.st_size, state.st_mtime_ns) for name, state in seen]


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
    return f"{out.rstrip('/')}.resume"
