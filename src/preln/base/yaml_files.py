"""YAML that users write: read safely, and refused in one line whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preln.base.errors import InputError

MOST = 100_000  # values in a file, those that aliases repeat counted each time
DEEPEST = 50


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, never objects.

    Raises:
        InputError: It is not UTF-8 or no YAML, a value has no meaning, it holds itself, nests deeper than 50
            levels, comes to more than 100,000 values, or holds a whole number of 64 bits and more.
        OSError: It cannot be opened; the caller knows what it should have been.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise InputError(f"{path}: nests too deeply to be read: write it with fewer levels") from error
    except OSError:
        raise
    except Exception as error:  # PyYAML's own errors, and those of the types that a word is turned into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as YAML ({reason[:200]}): mend the file") from error
    _count(values, path, {}, ())
    return values


def _count(value: Any, path: Path, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values there are in ``value``.

    Raises:
        InputError: Too many or too deep, or a value within itself.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{path}: holds a whole number beyond 2^63: give a smaller one")
    if not isinstance(value, dict | list | set):
        return 1
    if id(value) in above:
        raise InputError(f"{path}: a value holds itself (an alias within its own anchor): take it out")
    if len(above) > DEEPEST:
        raise InputError(f"{path}: nests deeper than {DEEPEST} levels: write it with fewer")
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = 1 + sum(_count(each, path, known, (*above, id(value))) for each in inner)
    if known[id(value)] > MOST:
        raise InputError(f"{path}: comes to more than {MOST:,} values (aliases repeat them): shorten it")
    return known[id(value)]
