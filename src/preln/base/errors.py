"""Errors that a user can mend, each one line that names the culprit and the mend."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Bad input: the command line prints its one line and exits with 2, with nothing written."""

    def __init__(self, message: object) -> None:
        """Keep the message as one line, whatever line breaks a name or a library put into it."""
        super().__init__(" ".join(str(message).split()))


class MissingExtraError(InputError):
    """A package from an optional extra is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: Dotted name to import, such as ``"peft"``.
        extra: The extra of this project that installs it.

    Raises:
        MissingExtraError: The package is absent; the message names the extra.

    >>> require("json", extra="none").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        raise MissingExtraError(
            f"the package {module!r} is not installed: run `pip install 'preln[{extra}]'`"
        ) from error
