"""A norm layer as people run it, beside its closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preln import closed_form as cf

KINDS = ("rms_norm", "rms_norm_outside", "layer_norm")


@dataclass(frozen=True)
class NormLayer:
    """One norm layer: call it for its output, ask it for what the theorems say about its Jacobian.

    Attributes:
        kind: `rms_norm` and `layer_norm` are torch's own functions; `rms_norm_outside` is x/(sqrt(ms) + eps).
        eps: the layer's eps.
        weight: `[d]`, the gain, or None.
    """

    kind: str
    eps: float
    weight: Tensor | None = None

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Apply the layer."""
        shape = (x.shape[-1],)
        if self.kind == "layer_norm":
            return functional.layer_norm(x, shape, self.weight, None, self.eps)
        if self.kind == "rms_norm":
            return functional.rms_norm(x, shape, self.weight, self.eps)
        y = x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)
        return y if self.weight is None else y * self.weight

    def denominator(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Return s, from the layer's definition: sqrt(ms + eps), sqrt(ms) + eps or sqrt(var + eps)."""
        if self.kind == "layer_norm":
            return (x.var(-1, correction=0) + self.eps).sqrt()
        square = x.square().mean(-1)
        return square.sqrt() + self.eps if self.kind == "rms_norm_outside" else (square + self.eps).sqrt()

    @property
    def _arguments(self) -> dict[str, float | str]:
        placement = {
            "rms_norm": {"eps_placement": "inside"},
            "rms_norm_outside": {"eps_placement": "outside"},
        }
        return {"eps": self.eps} | placement.get(self.kind, {})

    def _formula(self, name: str) -> Callable[..., Any]:
        return getattr(cf, ("layer_norm_" if self.kind == "layer_norm" else "rms_norm_") + name)

    def jacobian(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d d"]:
        """Return the closed form of the Jacobian."""
        return self._formula("jacobian")(x, self.weight, **self._arguments)

    def singular_values(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the closed form of the singular values."""
        return self._formula("singular_values")(x, self.weight, **self._arguments)

    def sigma(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Return the closed form of the largest singular value."""
        return self._formula("sigma")(x, self.weight, **self._arguments)

    def bounds(self, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Return the lower and upper bound of the gain theorems."""
        return self._formula("sigma_bounds")(x, self.weight, **self._arguments)


def autograd_jacobian(
    layer: Callable[[Tensor], Tensor], x: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch e d"]:
    """Return the Jacobian of a row-wise layer by backpropagation, one pass an output."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    rows = [torch.autograd.grad(y[..., k].sum(), x, retain_graph=True)[0] for k in range(y.shape[-1])]
    return torch.stack(rows, dim=-2).detach()


def dense_sigma(matrix: Float[Tensor, "*batch e d"]) -> Float[Tensor, "*batch"]:
    """Return the largest singular value by dense decomposition, scaled so that tiny matrices keep digits."""
    scale = matrix.abs().amax((-2, -1))
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.linalg.svdvals(matrix / safe[..., None, None])[..., 0] * scale
