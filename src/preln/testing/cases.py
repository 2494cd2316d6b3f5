"""Seeded norm layers and vectors, ordinary and nasty, for quick checks that repeat exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from preln.testing.layers import NormLayer

VECTOR_KINDS = (
    "normal",
    "zero",
    "constant",
    "one-hot",
    "huge",
    "subnormal",
    "tiny",
    "offset",
    "outlier",
    "integers",
)
GAIN_KINDS = ("none", "normal", "ones", "ties", "zeros", "one-hot", "wide", "nearly equal")
EPS = (1e-12, 1e-6, 1e-5, 1e-3, 0.25, 2.0)
DIMENSIONS = (1, 2, 3, 4, 7, 12, 24)
SUBNORMAL = 5e-324


def vectors(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    """Return `[count, d]` vectors of one kind, in float64."""
    x = torch.randn(count, d, dtype=torch.float64, generator=generator)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "constant":
        return x[:, :1].expand(count, d).clone()
    if kind == "one-hot":
        place = torch.randint(d, (count, 1), generator=generator)
        return torch.zeros_like(x).scatter(1, place, x[:, :1])
    if kind == "outlier":
        x[:, int(torch.randint(d, (1,), generator=generator))] *= 1e3
        return x
    if kind == "subnormal":
        return torch.randint(-9, 10, (count, d), generator=generator).to(torch.float64) * SUBNORMAL
    return {
        "normal": lambda: x,
        "huge": lambda: x * 1e30,
        "tiny": lambda: x * 1e-6,
        "offset": lambda: x + 100.0,
        "integers": lambda: x.round(),
    }[kind]()


def gain(kind: str, d: int, generator: torch.Generator) -> Tensor | None:
    """Return a `[d]` gain of one kind, in float64; None for no gain."""
    g = torch.randn(d, dtype=torch.float64, generator=generator)
    if kind == "none":
        return None
    if kind in ("zeros", "one-hot"):
        place = int(torch.randint(d, (1,), generator=generator))
        g[torch.arange(d) != place if kind == "one-hot" else place] = 0.0
        return g
    return {
        "normal": lambda: g,
        "ones": lambda: torch.ones_like(g),
        "ties": lambda: (1.5 * g).round(),
        "wide": lambda: (3 * g).exp(),
        "nearly equal": lambda: 1 + 1e-8 * g,
    }[kind]()


def cases(
    kind: str,
    *,
    seed: int,
    rounds: int,
    gained: bool,
    dimensions: tuple[int, ...] = DIMENSIONS,
    make: Callable[..., NormLayer] = NormLayer,
) -> Iterator[tuple[NormLayer, Tensor]]:
    """Yield a layer and `[n, d]` vectors of every kind it can be differentiated at, over all dimensions.

    Args:
        kind: one of `preln.testing.layers.KINDS`.
        seed: of the generator.
        rounds: how often to go through the dimensions.
        gained: whether layers have a gain.
        dimensions: the dimensions d.
        make: builds a layer from kind, eps and weight.
    """
    generator = torch.Generator().manual_seed(seed)
    for turn in range(rounds):
        for at, d in enumerate(dimensions):
            eps = EPS[(turn + at) % len(EPS)]
            weight = gain(GAIN_KINDS[(turn + at) % len(GAIN_KINDS)], d, generator) if gained else None
            # Backpropagation through sqrt(ms) has no value at 0, though the layer has a derivative there.
            kinds = [k for k in VECTOR_KINDS if kind != "rms_norm_outside" or k not in ("zero", "subnormal")]
            x = torch.cat([vectors(k, 2, d, generator) for k in kinds])
            if kind == "rms_norm_outside":
                x = x[x.abs().amax(-1) > 0]
            yield make(kind, eps, weight), x
