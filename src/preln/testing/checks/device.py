"""The formulas on a GPU: computed there in float64, compared with autograd of torch's layers on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from preln.testing.checks.norm import PROPERTIES
from preln.testing.layers import NormLayer
from preln.theory import Evidence

ROUNDS = 1


@dataclass(frozen=True)
class OnDevice(NormLayer):
    """A layer that runs where its input is and whose formulas are computed on another device.

    Attributes:
        device: where the formulas are computed; what comes back is on the input's device.
    """

    device: str = "cuda"

    def _there(self, x: Tensor) -> tuple[NormLayer, Tensor]:
        weight = None if self.weight is None else self.weight.to(self.device)
        return NormLayer(self.kind, self.eps, weight), x.to(self.device)

    def jacobian(self, x: Tensor) -> Tensor:
        """Return the closed form, computed on the device."""
        layer, there = self._there(x)
        return layer.jacobian(there).to(x.device)

    def singular_values(self, x: Tensor) -> Tensor:
        """Return the closed form, computed on the device."""
        layer, there = self._there(x)
        return layer.singular_values(there).to(x.device)

    def sigma(self, x: Tensor) -> Tensor:
        """Return the closed form, computed on the device."""
        layer, there = self._there(x)
        return layer.sigma(there).to(x.device)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the closed form, computed on the device."""
        layer, there = self._there(x)
        lower, upper = layer.bounds(there)
        return lower.to(x.device), upper.to(x.device)


def gpu() -> str | None:
    """Return the name of the GPU that the check runs on; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def on_device(id: str, device: str, name: str) -> list[Evidence]:
    """Return a norm claim's check with its formulas computed on a device; nothing for other claims.

    Args:
        id: the claim.
        device: such as `cuda`.
        name: what the evidence calls it.
    """
    if id not in PROPERTIES:
        return []
    found = PROPERTIES[id](ROUNDS, partial(OnDevice, device=device))
    return [
        replace(e, detail=e.detail | {"against": f"{e.detail['against']}; formulas on {name}"}) for e in found
    ]
