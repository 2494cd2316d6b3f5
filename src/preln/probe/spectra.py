"""Spectral norms as rows of a table: Lanczos, its evidence, and the bound beside each value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from preln.linops import LinearOperator, SingularTriple, extreme_singular_values
from preln.probe.bounds import tightness
from preln.probe.sums import Sums

_FLOOR = 1e-12  # share of the largest singular value below which a residual is not divided by a Ritz value


@dataclass(frozen=True)
class Lanczos:
    """How spectral norms are found; the fields are those of :func:`preln.linops.extreme_singular_values`."""

    rtol: float = 1e-3
    max_products: int = 64
    seed: int = 0

    def extremes(
        self, operator: LinearOperator, start: Tensor | None = None, *, both: bool = False
    ) -> tuple[SingularTriple, SingularTriple]:
        """The largest and the smallest triple of every map; ``both`` spends products on the smallest too."""
        return extreme_singular_values(
            operator, rtol=self.rtol, max_products=self.max_products, seed=self.seed, start=start, both=both
        )

    def largest(self, operator: LinearOperator, start: Tensor | None = None) -> SingularTriple:
        """The largest triple of every map."""
        return self.extremes(operator, start)[0]


def upper(triple: SingularTriple) -> Tensor:
    """``sigma + residual`` in float64: at least the largest singular value that the triple approximates.

    A Ritz value lies below the singular value, by at most the residual; bounds made from Ritz values alone
    would be too low by rounding or by an early stop.
    """
    return triple.sigma.double() + triple.residual.double()


class Rows:
    """Adds numbers, one a sequence, to the sums of one layer and site.

    The numbers are held back until :meth:`commit`, so that values whose claim turns out not to apply are
    never written.
    """

    def __init__(self, sums: Sums, layer: int) -> None:
        """Collect for ``layer``."""
        self.sums, self.layer = sums, layer
        self._pending: list[tuple[str, str, Tensor]] = []

    def put(self, measure: str, site: str, value: Tensor) -> None:
        """One number a sequence."""
        self._pending.append((measure, site, value))

    def largest(self, measure: str, site: str, triple: SingularTriple) -> None:
        """A largest singular value with its relative residual and its number of product pairs."""
        sigma = triple.sigma.double()
        self.put(measure, site, sigma)
        self.put(f"{measure}_residual", site, _relative(triple.residual.double(), sigma))
        self.put(f"{measure}_products", site, triple.steps)

    def smallest(self, measure: str, site: str, triple: SingularTriple, top: SingularTriple) -> None:
        """A smallest Ritz value with its residual relative to itself."""
        sigma, floor = triple.sigma.double(), _FLOOR * top.sigma.double()
        self.put(measure, site, sigma)
        self.put(
            f"{measure}_residual", site, _relative(triple.residual.double(), torch.maximum(sigma, floor))
        )

    def bound(self, measure: str, site: str, value: Tensor, bound: Tensor, *, below: bool = False) -> None:
        """A bound and how much of it is used up; ``below``: the value lies above the bound."""
        self.put(f"{measure}_bound", site, bound)
        ends = (bound, value) if below else (value, bound)
        self.put(f"{measure}_tightness", site, tightness(*ends))

    def commit(self) -> None:
        """Hand everything over."""
        for measure, site, value in self._pending:
            value = value.double()
            self.sums.add((measure, self.layer, site, "mean"), "ratio", value, torch.ones_like(value))
        self._pending.clear()


def _relative(residual: Tensor, scale: Tensor) -> Tensor:
    """``residual/scale``, 0 where both are 0."""
    return torch.where(residual == 0, residual, residual / scale.clamp_min(1e-300))
