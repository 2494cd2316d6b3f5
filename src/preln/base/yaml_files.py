"""YAML that users write: read safely, and refused in one line whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preln.base.errors import InputError

MOST = 100_000  # values in a file, those that aliases repeat counted each time
DEEPEST = 50


class _TooDeepError(Exception):
    """The levels of a file go beyond the deepest that is read."""


class _TooManyError(Exception):
    """Mappings merged into others come to more values than are read."""


class _Bounded(yaml.SafeLoader):
    """Plain values only; stops at the first level too deep, before the rest is looked at."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One value with all that is in it."""
        if self._level > DEEPEST:
            raise _TooDeepError
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """One mapping with what it merges (``<<``) copied into it."""
        super().flatten_mapping(node)
        if len(node.value) > MOST:
            raise _TooManyError


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, never objects.

    Raises:
        InputError: It is not UTF-8, or :func:`parse_yaml` refuses it.
        OSError: It cannot be opened; the caller knows what it should have been.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(error, path) from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> Any:
    """What a text in YAML says: plain values, never objects.

    Raises:
        InputError: It is no YAML, a value has no meaning, it holds itself, nests deeper than 50 levels, comes
            to more than 100,000 values, or holds a whole number of 64 bits and more; ``path`` is named.
    """
    try:
        values = _Bounded(text).get_single_data()
    except _TooDeepError as error:
        raise _too_deep(path) from error
    except _TooManyError as error:
        raise _too_many(path) from error
    except Exception as error:  # PyYAML's own errors, and those of the types that a word is turned into
        raise _unreadable(error, path) from error
    _count(values, path, {}, ())
    return values


def _unreadable(error: Exception, path: Path) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: cannot be read as YAML ({reason[:200]}): mend the file")


def _too_deep(path: Path) -> InputError:
    return InputError(f"{path}: nests deeper than {DEEPEST} levels: write it with fewer")


def _too_many(path: Path) -> InputError:
    return InputError(f"{path}: comes to more than {MOST:,} values (aliases repeat them): shorten it")


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
        raise _too_deep(path)
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = 1 + sum(_count(each, path, known, (*above, id(value))) for each in inner)
    if known[id(value)] > MOST:
        raise _too_many(path)
    return known[id(value)]
