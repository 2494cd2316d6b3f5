"""preln: proofs about Pre-LN gradient flow, and measurements that put them to the test.

Everything here is loaded on first use: ``import preln`` brings in neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "anatomy": "preln.models",
    "load_model": "preln.models",
    "load_rows": "preln.data",
    "load_tokens": "preln.data",
    "score": "preln.prune",
    "verify": "preln.testing.verify",
}
# probe, prune, heal and evaluate are packages that can be called (see preln.base.rooms)
_ROOMS = (
    *("closed_form", "data", "evaluate", "experiment", "heal", "linops"),
    *("models", "probe", "prune", "report", "testing", "theory"),
)
__all__ = ["InputError", "__version__", *sorted(_EXPORTS), *_ROOMS]

if TYPE_CHECKING:
    from preln.base.errors import InputError


def __getattr__(name: str) -> Any:
    """Load a public function, or a room, when it is first asked for (PEP 562)."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"preln.{name}")
    if name == "InputError":
        return importlib.import_module("preln.base.errors").InputError
    raise AttributeError(f"module 'preln' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion."""
    return sorted(__all__)
