"""Rooms that are also verbs: ``preln.probe`` is a package and can be called like the function it exports.

Python binds a subpackage's name in its parent on import, so ``preln.probe`` would be a function or a module
depending on what was imported first. A callable module is both at any time.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any


def callable_room(package: str) -> None:
    """Make the package callable as the function of its own last name: ``preln.probe(...)``.

    Called at the end of the package's ``__init__``, where that function is already bound.
    """
    module = sys.modules[package]
    function = getattr(module, package.rpartition(".")[2])

    class Room(ModuleType):
        """A package that is called like the verb it is named after."""

        @functools.wraps(function)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module.__class__ = Room
