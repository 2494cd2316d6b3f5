"""Strategies, assertions and tolerances for norm layers, for this project's tests and its users' own."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "NormLayer": "layers",
    "autograd_jacobian": "layers",
    "dense_sigma": "layers",
    "check_property": "hunt",
    "assert_jacobian_matches": "assertions",
    "assert_sigma_bound": "assertions",
    "tolerance": "tolerances",
    "eps_values": "strategies",
    "gains": "strategies",
    "norm_inputs": "strategies",
    "norm_layers": "strategies",
}
__all__ = [
    "NormLayer",
    "assert_jacobian_matches",
    "assert_sigma_bound",
    "autograd_jacobian",
    "check_property",
    "dense_sigma",
    "eps_values",
    "gains",
    "norm_inputs",
    "norm_layers",
    "tolerance",
]


def __getattr__(name: str) -> Any:
    """Import a name where it is first used: only the strategies need Hypothesis."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"preln.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'preln.testing' has no attribute {name!r}")
