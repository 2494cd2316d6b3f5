"""What every claim is put to on numbers: property checks and Monte Carlo, by claim."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

from preln.theory import Evidence

Check = Callable[[int], list[Evidence]]
"""rounds -> evidence"""

_ROOMS = (
    *("norm", "variant", "comparison", "block", "depth", "growth"),
    *("pruning", "similarity", "healing", "cost"),
)


@cache
def checks() -> dict[str, Check]:
    """Return claim -> check with evidence of kind `property`."""
    found: dict[str, Check] = {}
    for room in _ROOMS:
        found |= importlib.import_module(f"preln.testing.checks.{room}").PROPERTIES
    return found


def in_use(id: str, rounds: int) -> list[Evidence]:
    """Return what modules in use say of the exact sigma with a gain; nothing for other claims."""
    from preln.testing.checks.variant import ONE_PLUS, modules
    from preln.testing.modules import LN_MODULES, RMS_MODULES

    names = {"RMS-GAIN": RMS_MODULES, "LN-GAIN": LN_MODULES}.get(id, ())
    return modules(tuple(n for n in names if n not in ONE_PLUS and not n.endswith("per head")), rounds)


@cache
def measurements() -> dict[str, Check]:
    """Return claim -> check with evidence of kind `measurement`, by Monte Carlo."""
    return importlib.import_module("preln.testing.checks.monte_carlo").MEASUREMENTS
