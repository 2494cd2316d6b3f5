"""Assertions about norm layers that say which entries differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from preln.base.errors import InputError
from preln.testing.layers import autograd_jacobian, dense_sigma
from preln.testing.tolerances import tolerance

SHOWN = 5


def assert_jacobian_matches(
    layer: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d"],
    jacobian: Float[Tensor, "*batch e d"] | Callable[[Tensor], Tensor],
    *,
    rtol: float | None = None,
) -> None:
    """Assert that autograd's Jacobian of `layer` at `x` is `jacobian`.

    Errors are measured against the largest entry of each expected matrix.

    Args:
        layer: maps `[..., d]` to `[..., e]`, each row by itself.
        x: where to differentiate.
        jacobian: the expected matrices, or a function of x that gives them.
        rtol: the relative tolerance; by default `tolerance` of x's dtype.

    Raises:
        AssertionError: they differ; the message lists the worst entries.
    """
    expected = jacobian(x) if callable(jacobian) else jacobian
    actual = autograd_jacobian(layer, x)
    if actual.shape != expected.shape:
        raise AssertionError(f"Jacobian has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    rtol = tolerance(x.dtype) if rtol is None else rtol
    scale = expected.abs().amax((-2, -1), keepdim=True)
    error = (actual - expected).abs()
    # `not <=` catches NaN, which is never within a tolerance.
    bad = ~(error <= rtol * scale)
    if bad.any():
        places = bad.nonzero()
        order = error[bad].nan_to_num(torch.inf).argsort(descending=True)[:SHOWN]
        lines = [
            f"  {tuple(at.tolist())}: autograd {actual[tuple(at)].item():.17g}, expected "
            "{expected[tuple(at)].item():.17g}"
            for at in places[order]
        ]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} Jacobian entries differ by more than {rtol:g} of the "
            "largest:\n" + "\n".join(lines)
        )


def assert_sigma_bound(
    layer: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d"],
    bound: Float[Tensor, "*batch"] | float | Callable[[Tensor], Tensor],
    *,
    side: str = "upper",
    rtol: float | None = None,
) -> None:
    """Assert that the largest singular value of `layer`'s Jacobian at `x` respects a bound.

    Args:
        layer: maps `[..., d]` to `[..., e]`, each row by itself.
        x: where to differentiate.
        bound: one value a row, or a function of x that gives them.
        side: `upper` (sigma <= bound), `lower` (sigma >= bound) or `equal`.
        rtol: the relative tolerance; by default `tolerance` of x's dtype.

    Raises:
        AssertionError: the bound is broken; the message lists the worst rows.
        InputError: `side` is none of the three.
    """
    if side not in ("upper", "lower", "equal"):
        raise InputError(f"side is {side!r}: use 'upper', 'lower' or 'equal'")
    sigma = dense_sigma(autograd_jacobian(layer, x))
    limit = torch.as_tensor(bound(x) if callable(bound) else bound, dtype=sigma.dtype).expand_as(sigma)
    slack = (tolerance(x.dtype) if rtol is None else rtol) * torch.maximum(limit.abs(), sigma)
    over, under = sigma - limit - slack, limit - sigma - slack
    excess = {"upper": over, "lower": under, "equal": torch.maximum(over, under)}[side]
    bad = ~(excess <= 0)
    if bad.any():
        order = excess.flatten().nan_to_num(torch.inf).argsort(descending=True)[: min(SHOWN, int(bad.sum()))]
        lines = [
            f"  row {k}: sigma {sigma.flatten()[k].item():.17g}, bound {limit.flatten()[k].item():.17g}"
            for k in order.tolist()
        ]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} rows break the {side} bound:\n" + "\n".join(lines)
        )
