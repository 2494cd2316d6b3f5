"""A growing orthonormal basis for every map of a batch, kept in one block of memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_FIRST = 8  # vectors that fit before the memory doubles
_KEPT = 0.7  # a projection that leaves this share of a length loses no digit worth a second pass


class Basis:
    """Orthonormal vectors ``[b, k, n]``, k growing one by one.

    The memory is at most twice k b n numbers: it doubles when it is full, so that adding a vector copies
    nothing that was there, on average.
    """

    def __init__(self, batch: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Start with no vectors of ``size`` entries for each of ``batch`` maps."""
        self._memory = torch.empty(batch, min(_FIRST, size + 1), size, dtype=dtype, device=device)
        self.count = 0

    @property
    def vectors(self) -> Tensor:
        """A view of the vectors, ``[b, k, n]``."""
        return self._memory[:, : self.count]

    def append(self, vector: Float[Tensor, "b n"]) -> None:
        """Add one vector a map: a unit vector orthogonal to the others, or zero where there is none."""
        if self.count == self._memory.shape[1]:
            self._memory = torch.cat([self._memory, torch.empty_like(self._memory)], dim=1)
        self._memory[:, self.count] = vector
        self.count += 1

    def without(self, vector: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The part of a vector that is orthogonal to the basis.

        Projected twice where the first pass cancels digits (Daniel, Gragg, Kaufman and Stewart 1976).
        """
        if not self.count:
            return vector
        q, rest = self.vectors, vector[:, None]
        for _ in range(2):
            before = torch.linalg.vector_norm(rest, dim=-1)
            rest = torch.baddbmm(rest, torch.bmm(rest, q.mT), q, alpha=-1)
            if bool((torch.linalg.vector_norm(rest, dim=-1) >= _KEPT * before).all()):
                break
        return rest[:, 0]

    def combine(self, coefficients: Float[Tensor, "b k"]) -> Float[Tensor, "b n"]:
        """The linear combination of the first k vectors of each map."""
        q = self._memory[:, : coefficients.shape[1]]
        return torch.bmm(coefficients.to(q.dtype)[:, None], q)[:, 0]
