"""One place that says how close two computations must be."""

from __future__ import annotations

import torch

from preln.base.errors import InputError

SLACK = 64.0
"""Roundings allowed on top of the conditioning: a few sums and divisions, for the sizes that tests use."""


def tolerance(dtype: torch.dtype, conditioning: float = 1.0) -> float:
    """Return the relative error that a backward stable computation may have.

    It is 64 times the spacing of the dtype at 1, times the conditioning of the result (at least 1).

    Raises:
        InputError: the dtype is not a floating-point one.

    >>> tolerance(torch.float64) < 1e-13 < 1e-6 < tolerance(torch.float32) < 1e-5
    True
    """
    if not dtype.is_floating_point:
        raise InputError(f"dtype {dtype} has no rounding: pass a floating-point dtype")
    return SLACK * torch.finfo(dtype).eps * max(1.0, float(conditioning))
