"""Which formula a norm module computes, found by measurement, and its exact spectral norm at real inputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.closed_form import layer_norm_sigma, rms_norm_sigma
from preln.models.residual import wide

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_EPS_GUESSES = (1e-5, 1e-6, 1e-8, 1e-12, 0.0)


@dataclass(frozen=True)
class NormLaw:
    """A norm as a formula: ``weight * z/s`` with ``z = x`` or centred, and s the denominator.

    Attributes:
        kind: ``rms`` or ``layer``.
        weight: The gain that multiplies, float32 or wider (Gemma's stored weight plus 1), or None.
        eps: The module's own eps.
        eps_placement: ``inside`` the root, or ``outside``.
        stored_as: ``gain``, ``1+weight`` or ``none``: how the module holds its gain.
        error: Largest relative difference between formula and module on the test vectors.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None
    eps: float
    eps_placement: Literal["inside", "outside"]
    stored_as: str
    error: float

    def apply(self, x: Tensor) -> Tensor:
        """The formula, without bias, written out."""
        z = x - x.mean(dim=-1, keepdim=True) if self.kind == "layer" else x
        z = z / self.scale(x)[..., None]
        return z if self.weight is None else z * self.weight

    def scale(self, x: Tensor) -> Tensor:
        """The denominator s of every vector."""
        z = x - x.mean(dim=-1, keepdim=True) if self.kind == "layer" else x
        square = z.square().mean(dim=-1)
        return (square + self.eps).sqrt() if self.eps_placement == "inside" else square.sqrt() + self.eps

    def sigma(self, x: Tensor, *, gain: bool = True) -> Tensor:
        """Exact largest singular value of the Jacobian at each vector, ``[..., d] -> [...]``."""
        weight = self.weight if gain else None
        if self.kind == "layer":
            return layer_norm_sigma(x, weight, eps=self.eps)
        return rms_norm_sigma(x, weight, eps=self.eps, eps_placement=self.eps_placement)

    def bound(self, x: Tensor) -> Tensor:
        """``max|gain|/s``, which the exact value never exceeds."""
        largest = 1.0 if self.weight is None else self.weight.abs().max()
        return largest / self.scale(x)


def recognise(norm: nn.Module, width: int) -> NormLaw:
    """Find the formula that reproduces a norm module on test vectors of several sizes.

    The vectors have a mean, so that centring shows, and sizes down to sqrt(eps), so that the value and the
    place of eps show.

    Raises:
        InputError: No formula fits.
    """
    parameter = next(norm.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, width, generator=generator) + 0.7
    sizes = torch.tensor([30.0, 1.0, 0.1, 1e-2, 3e-3, 1e-3])[:, None]
    x = (base * sizes).to(parameter.device, parameter.dtype)
    with torch.no_grad():
        true = wide(norm(x[None])[0])
        x = wide(x)
        bias = getattr(norm, "bias", None)
        if isinstance(bias, Tensor):
            true = true - wide(bias.detach())
        raw = getattr(norm, "weight", None)
        gains: list[tuple[str, Tensor | None]] = [("none", None)]
        if isinstance(raw, Tensor):
            raw = wide(raw.detach())
            gains = [("gain", raw), ("1+weight", 1.0 + raw)]
        own = [float(v) for n in _EPS_NAMES if isinstance(v := getattr(norm, n, None), int | float)]
        laws = []
        for kind, (stored, gain), eps, place in itertools.product(
            ("rms", "layer"), gains, own or _EPS_GUESSES, ("inside", "outside")
        ):
            if kind == "layer" and place == "outside":
                continue
            law = NormLaw(kind, gain, eps, place, stored, 0.0)
            off = torch.linalg.vector_norm(law.apply(x) - true, dim=-1)
            error = (off / torch.linalg.vector_norm(true, dim=-1).clamp_min(1e-12)).max().item()
            laws.append(NormLaw(kind, gain, eps, place, stored, error))
    best = min(laws, key=lambda law: law.error)
    if not best.error <= (1e-4 if parameter.dtype in (torch.float32, torch.float64) else 3e-2):
        raise InputError(
            f"norm {type(norm).__name__}: neither RMSNorm nor LayerNorm reproduces it "
            f"(off by {best.error:.1e}): leave the norm measures out"
        )
    return best
