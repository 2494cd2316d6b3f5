"""What both norms share: the gain, dense singular values, bounds from the sorted gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preln.closed_form.vectors import Rows, top_gains


def apply_gain(matrix: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply row i of each matrix by gain i."""
    return matrix if weight is None else weight[..., :, None] * matrix


def dense_singular_values(rows: Rows, dense: Callable[[Rows], Tensor]) -> Tensor:
    """Decompose the dense Jacobians a few at a time."""
    d = rows.unit.shape[-1]
    values = torch.empty_like(rows.unit)
    size = max(1, (1 << 22) // d**2)
    for at in range(0, len(values), size):
        cut = slice(at, at + size)
        values[cut] = torch.linalg.svdvals(dense(rows[cut]))
    return values


def sigma_bounds(rows: Rows, x: Tensor, *, nth: int) -> tuple[Tensor, Tensor]:
    """Return (|gamma|_(nth)/s, |gamma|_(1)/s) in x's dtype and shape."""
    bounds = [top_gains(rows.weight, x.shape[-1], k, rows.scale) / rows.scale for k in (nth, 1)]
    lower, upper = (bound.reshape(x.shape[:-1]).to(x.dtype) for bound in bounds)
    return lower, upper
