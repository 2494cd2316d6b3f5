"""What the formulas of a norm layer need of each vector, scaled so that 1e30 does not overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from preln.base.errors import InputError

ROW_BUDGET = 1 << 18
"""Entries worked on at a time: large enough to hide the call overhead, small enough to stay in cache."""


@dataclass(frozen=True)
class Rows:
    """Vectors and gain in float64, with what the layer makes of them.

    Attributes:
        unit: `[n, d]`, x (centred for LayerNorm) divided by its length; zeros where it is zero.
        scale: `[n]`, the layer's denominator s.
        shrink: `[n]`, t: the eigenvalue along `unit` is t/s; t = eps/s^2 (eps inside) or eps/s (outside), 1
            at x = 0.
        complement: `[n]`, 1 - t = ms/s^2 (inside) or rms/s (outside), computed without a difference.
        weight: `[d]` or `[n, d]` or None.
    """

    unit: Tensor
    scale: Tensor
    shrink: Tensor
    complement: Tensor
    weight: Tensor | None

    @property
    def kappa(self) -> Tensor:
        """1 - t^2, the weight of the rank-one term in (s B)^2: `[n]`."""
        return self.complement * (1 + self.shrink)

    def chunks(self) -> list[Rows]:
        """Split into pieces of about `ROW_BUDGET` entries."""
        n, d = self.unit.shape
        size = max(1, ROW_BUDGET // d)
        pieces = []
        for at in range(0, n, size):
            cut = slice(at, at + size)
            weight = self.weight if self.weight is None or self.weight.ndim == 1 else self.weight[cut]
            pieces.append(
                Rows(self.unit[cut], self.scale[cut], self.shrink[cut], self.complement[cut], weight)
            )
        return pieces


def prepare(x: Tensor, weight: Tensor | None, eps: float, *, centre: bool, outside: bool = False) -> Rows:
    """Check the arguments and compute what the formulas need.

    Args:
        x: `[..., d]`, floating point.
        weight: the gain, broadcastable to x, or None.
        eps: the layer's eps, at least 0.
        centre: True for LayerNorm.
        outside: eps outside the root (RMSNorm only).

    Raises:
        InputError: x is not floating point or has no last dimension, eps is negative, or the gain does not
            fit.
    """
    check(x, weight, eps)
    d = x.shape[-1]
    rows = x.detach().reshape(-1, d).to(torch.float64)
    rows = center(rows) if centre else rows
    unit, rms = normalise(rows)
    root_eps = eps if outside else eps**0.5
    scale = rms + eps if outside else torch.hypot(rms, torch.full_like(rms, root_eps))
    power = 1 if outside else 2
    shrink, complement = (root_eps / scale) ** power, (rms / scale) ** power
    if weight is not None:
        weight = weight.detach().to(torch.float64)
        weight = weight.expand(d) if weight.ndim <= 1 else weight.expand(x.shape).reshape(-1, d)
    return Rows(unit, scale, shrink, complement, weight)


def check(x: Tensor, weight: Tensor | None, eps: float) -> None:
    """Refuse arguments that no norm layer takes."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(f"x has type {getattr(x, 'dtype', type(x).__name__)}: pass a floating-point tensor")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x has shape {tuple(x.shape)}: its last dimension must hold the vectors' entries")
    if not 0 <= eps < float("inf"):
        raise InputError(f"eps is {eps}: it must be at least 0 and finite")
    if weight is not None:
        try:
            fits = torch.broadcast_shapes(weight.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"weight has shape {tuple(weight.shape)}: it must fit x of shape {tuple(x.shape)}"
            )


def center(x: Tensor) -> Tensor:
    """Subtract each row's mean, twice: the second time removes what rounding of the first mean left.

    A constant row becomes exactly zero.
    """
    largest = x.abs().amax(-1, keepdim=True)
    constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    once = x / safe - (x / safe).mean(-1, keepdim=True)
    twice = (once - once.mean(-1, keepdim=True)) * safe
    return torch.where(constant, torch.zeros_like(x), twice)


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row divided by its length (zeros stay zeros), and its root mean square."""
    largest = x.abs().amax(-1, keepdim=True)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    scaled = x / safe
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(largest > 0, scaled / length, torch.zeros_like(scaled))
    rms = (largest * length / x.shape[-1] ** 0.5).squeeze(-1)
    return unit, rms


def top_gains(weight: Tensor | None, d: int, k: int, like: Tensor) -> Tensor:
    """Return the k-th largest absolute gain of each row, 0 where the vector has fewer than k entries."""
    if weight is None:
        weight = torch.ones(d, dtype=torch.float64, device=like.device)
    if k > d:
        return torch.zeros_like(weight[..., 0]).expand_as(like)
    return weight.abs().topk(k, dim=-1).values[..., k - 1].expand_as(like)
