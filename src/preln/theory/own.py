"""Claims that users bring along in a Python file of their own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from preln.base.errors import InputError
from preln.theory.claims import CLAIMS
from preln.theory.ledger import registry


@contextmanager
def own_claims(paths: Iterable[str | Path]) -> Iterator[list[str]]:
    """Register the claims of some files for as long as the context lasts.

    The files are run as Python code. They register with the decorator `preln.theory.claim`.

    Args:
        paths: Python files.

    Yields:
        The IDs that the files added.

    Raises:
        InputError: a file is missing, fails, registers nothing, or takes an ID that exists.
    """
    built_in = set(registry())
    names: list[str] = []
    try:
        for number, path in enumerate(paths):
            before = set(CLAIMS)
            names.append(f"preln_own_claims_{number}")
            _run(Path(path), names[-1])
            if set(CLAIMS) == before:
                raise InputError(
                    f"{path}: it registers no claim: decorate a function with preln.theory.claim"
                )
        yield [id for id in CLAIMS if id not in built_in]
    finally:
        for id in set(CLAIMS) - built_in:
            del CLAIMS[id]
        for name in names:
            sys.modules.pop(name, None)


def _run(path: Path, name: str) -> None:
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"{path}: no such Python file: give the path of a .py file with claims")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        raise InputError(f"{path}: it fails with {type(error).__name__}: {error}") from error
