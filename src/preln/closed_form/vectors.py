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
        raw: `[n, d]`, x times a power of two, not centred: differences of its entries are those of x to the
            last digit.
        length: `[n]`, the length of x (centred for LayerNorm) times the same power of two; 1 where it is 0.
    """

    unit: Tensor
    scale: Tensor
    shrink: Tensor
    complement: Tensor
    weight: Tensor | None
    raw: Tensor
    length: Tensor

    @property
    def kappa(self) -> Tensor:
        """1 - t^2, the weight of the rank-one term in (s B)^2: `[n]`."""
        return self.complement * (1 + self.shrink)

    @property
    def gain(self) -> Tensor:
        """The gain, ones where there is none: `[d]` or `[n, d]`."""
        return torch.ones_like(self.unit[0]) if self.weight is None else self.weight

    def __getitem__(self, cut: slice) -> Rows:
        """Return some of the rows."""
        weight = self.weight if self.weight is None or self.weight.ndim == 1 else self.weight[cut]
        return Rows(
            self.unit[cut],
            self.scale[cut],
            self.shrink[cut],
            self.complement[cut],
            weight,
            self.raw[cut],
            self.length[cut],
        )

    def chunks(self) -> list[Rows]:
        """Split into pieces of about `ROW_BUDGET` entries."""
        n, d = self.unit.shape
        size = max(1, ROW_BUDGET // d)
        return [self[at : at + size] for at in range(0, n, size)]


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
    raw, power = rescale(x.detach().reshape(-1, d).to(torch.float64))
    vectors = center(raw) if centre else raw
    length = vectors.square().sum(-1).sqrt()
    rms = length * power / d**0.5
    length = torch.where(length > 0, length, torch.ones_like(length))
    unit = vectors / length[:, None]
    root_eps = eps if outside else eps**0.5
    scale = rms + eps if outside else torch.hypot(rms, torch.full_like(rms, root_eps))
    power = 1 if outside else 2
    shrink, complement = (root_eps / scale) ** power, (rms / scale) ** power
    if weight is not None:
        weight = weight.detach().to(torch.float64)
        weight = weight.expand(d) if weight.ndim <= 1 else weight.expand(x.shape).reshape(-1, d)
    return Rows(unit, scale, shrink, complement, weight, raw, length)


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


def rescale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by the power of two that brings its largest entry into [1, 2); return that power, too.

    Unlike division by the largest entry this rounds nothing, so small differences of large entries survive.
    """
    largest = x.abs().amax(-1)
    mantissa = torch.frexp(largest).mantissa
    usable = (largest > 0) & largest.isfinite()
    power = torch.where(usable, largest / (2 * mantissa), torch.ones_like(largest))
    return x / power[:, None], power


def center(x: Tensor) -> Tensor:
    """Subtract each row's mean, twice: the second time removes what rounding of the first mean left.

    Entries are below 2 in size. A constant row becomes exactly zero.
    """
    constant = x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)
    once = x - x.mean(-1, keepdim=True)
    return torch.where(constant, torch.zeros_like(x), once - once.mean(-1, keepdim=True))


def top_gains(weight: Tensor | None, d: int, k: int, like: Tensor) -> Tensor:
    """Return the k-th largest absolute gain of each row, 0 where the vector has fewer than k entries."""
    if weight is None:
        weight = torch.ones(d, dtype=torch.float64, device=like.device)
    if k > d:
        return torch.zeros_like(weight[..., 0]).expand_as(like)
    return weight.abs().topk(k, dim=-1).values[..., k - 1].expand_as(like)
