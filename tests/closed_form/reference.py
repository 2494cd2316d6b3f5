"""Fast reference: dense Jacobians in float64 whose entries do not cancel, and the cases they are made for.

Subtracting u u^T from the identity loses the digits of every row that nearly vanishes, and there sigma may be
far below |gamma|_(1)/s. Here each entry is a sum of terms of one sign, or small against its row, so that the
decomposition, backward stable against sigma itself, gives sigma to a few roundings:

- RMSNorm: 1 - (1 - t) u_i^2 = t u_i^2 + sum of the other u_j^2;
- LayerNorm: with M_ik = (u_k - u_i)/sqrt(d), the projector off 1 and u has the entries -(M M^T)_ij off the
  diagonal and the sum of M_jk^2 over pairs without i on it (Lagrange's identity).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from preln.testing.cases import GAIN_KINDS, VECTOR_KINDS, gain, vectors
from preln.testing.layers import NormLayer

EPS = (1e-12, 1e-6, 1e-5, 1e-3, 0.25, 2.0)
ORDINARY_GAINS = tuple(k for k in GAIN_KINDS if k != "none")
HARD_VECTORS = ("nearly one-hot", "one-hot on offset", "two nearly equal", "nearly constant", "graded")
HARD_GAINS = ("negative", "one large", "two large")


def jacobians(layer: NormLayer, x: Tensor) -> Tensor:
    """Jacobians `[n, d, d]` at the rows of x, divided by |gamma|_(1)/s; that factor is the second value."""
    x = x.double()
    d = x.shape[-1]
    largest = x.abs().amax(-1, keepdim=True)
    power = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)
    x = x / power
    others = 1 - torch.eye(d, dtype=x.dtype)
    if layer.kind == "layer_norm":
        apart = x[:, None, :] - x[:, :, None]
        length = (apart.square().sum((-2, -1)) / (2 * d)).sqrt()
        centred = -apart.mean(-1)
    else:
        apart, length, centred = None, x.square().sum(-1).sqrt(), x
    safe = torch.where(length > 0, length, 1.0)
    u = centred / safe[:, None]
    rms = length * power[:, 0] / d**0.5
    if layer.kind == "rms_norm_outside":
        s = rms + layer.eps
        t = layer.eps / s
    else:
        s = torch.hypot(rms, torch.tensor(layer.eps**0.5, dtype=x.dtype))
        t = (layer.eps**0.5 / s).square()
    if apart is None:
        flat = -u[:, :, None] * u[:, None, :]
        flat = flat * others + torch.diag_embed(u.square() @ others)
        plain = torch.eye(d, dtype=x.dtype)
    else:
        m = apart / (safe[:, None, None] * d**0.5)
        pairs = (others * (m.square() @ others)).sum(-2) / 2
        flat = -(m @ m.mT) * others + torch.diag_embed(pairs)
        plain = torch.eye(d, dtype=x.dtype) - 1 / d
    matrix = flat + t[:, None, None] * u[:, :, None] * u[:, None, :]
    matrix = torch.where((length > 0)[:, None, None], matrix, plain)
    weight = torch.ones(d, dtype=x.dtype) if layer.weight is None else layer.weight.double()
    top = weight.abs().max()
    return (weight / (top if top > 0 else 1.0))[:, None] * matrix, top / s


def sigma(layer: NormLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest singular values `[n]`, and |gamma|_(1)/s."""
    matrix, unit = jacobians(layer, x)
    return torch.linalg.svdvals(matrix)[:, 0] * unit, unit


def hard_vectors(kind: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    """Vectors near a coordinate axis or near a constant, where sigma falls far below |gamma|_(1)/s."""
    x = torch.randn(count, d, dtype=torch.float64, generator=generator)
    small = 10.0 ** torch.randint(-9, 0, (count, 1), generator=generator).double()
    axis = torch.zeros_like(x).scatter(1, torch.randint(d, (count, 1), generator=generator), 1.0)
    return {
        "nearly one-hot": lambda: axis * 3 + small * x,
        "one-hot on offset": lambda: axis * 3 + small * x + 7.0,
        "two nearly equal": lambda: axis * 3 + axis.roll(1, -1) * (3 + small) + small * x.sign(),
        "nearly constant": lambda: 5.0 + small * x,
        "graded": lambda: x * 10.0 ** -torch.arange(d, dtype=x.dtype).remainder(9),
    }[kind]()


def hard_gain(kind: str, d: int, generator: torch.Generator) -> Tensor:
    """Gains with one or two entries far above the rest, or all negative."""
    g = torch.randn(d, dtype=torch.float64, generator=generator)
    large = torch.randperm(d, generator=generator)[: 1 if kind == "one large" else 2]
    if kind != "negative":
        g[large] *= 10.0 ** torch.randint(2, 7, (len(large),), generator=generator).double()
    return -g.abs() if kind == "negative" else g


def cases(kind: str, *, seed: int, dimensions: range, each: int = 1) -> Iterator[tuple[NormLayer, Tensor]]:
    """Yield a layer and vectors `[n, d]` of every kind, for every dimension and every kind of gain."""
    generator = torch.Generator().manual_seed(seed)
    for d in dimensions:
        for at, name in enumerate((*ORDINARY_GAINS, *HARD_GAINS)):
            weight = hard_gain(name, d, generator) if name in HARD_GAINS else gain(name, d, generator)
            ordinary = [vectors(k, each, d, generator) for k in VECTOR_KINDS]
            hard = [hard_vectors(k, each, d, generator) for k in HARD_VECTORS]
            aimed = torch.zeros(each, d, dtype=torch.float64)
            if weight is not None:
                # x along the largest gain: the vector that takes most away from sigma
                aimed[:, int(weight.abs().argmax())] = 2.0
            x = torch.cat([*ordinary, *hard, aimed, aimed + 1e-7 * ordinary[0]])
            yield NormLayer(kind, EPS[(d + at) % len(EPS)], weight), x
