"""Mutated formulas: wrong closed forms that the checks on numbers must catch.

A mutant's call is the true layer; its formulas are those of a slightly different one. A check that passes
with a mutant in place of the true formulas would not notice that mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from preln.testing.checks.norm import PROPERTIES
from preln.testing.layers import NormLayer
from preln.theory import Evidence
from preln.theory.mutation import control

ROUNDS = 1
LAYER = ("eps dropped", "eps moved", "dimension off by one")
MATRIX = (*LAYER, "term dropped")
MUTATIONS: dict[str, tuple[str, ...]] = {
    "RMS-JAC": (*MATRIX, "gain dropped"),
    "LN-JAC": (*MATRIX, "gain dropped", "centring dropped"),
    "RMS-SPEC": MATRIX,
    "LN-SPEC": (*MATRIX, "centring dropped"),
    "RMS-NORM": LAYER,
    "RMS-PAPER": LAYER,
    "LN-NORM-D3": (*LAYER, "centring dropped"),
    "RMS-GAIN-BOUND": (*LAYER, "gain dropped", "bound tightened", "bound loosened", "inequality turned"),
    "LN-GAIN-BOUND": (
        *(*LAYER, "gain dropped", "centring dropped"),
        *("bound tightened", "bound loosened", "inequality turned"),
    ),
    "RMS-GAIN": (*MATRIX, "gain dropped"),
    "LN-GAIN": (*MATRIX, "gain dropped", "centring dropped"),
}
"""Claim -> what is done to the formulas that its check uses."""


@dataclass(frozen=True)
class Mutant(NormLayer):
    """A true layer with mutated formulas.

    Attributes:
        mutation: one of `preln.theory.mutation.MUTATIONS`.
    """

    mutation: str = "other"

    def _wrong(self, x: Tensor) -> tuple[NormLayer, Tensor]:
        """Return the layer and the input whose true formulas are this mutant's."""
        layer, d = NormLayer(self.kind, self.eps, self.weight), x.shape[-1]
        if self.mutation == "eps dropped":
            return replace(layer, eps=0.0), x
        if self.mutation == "eps moved":
            # LayerNorm has no eps outside the root among the formulas: sqrt(var + eps^2) stands for it.
            other = {"rms_norm": "rms_norm_outside", "rms_norm_outside": "rms_norm"}
            wrong = (
                replace(layer, kind=other[self.kind])
                if self.kind in other
                else replace(layer, eps=self.eps**2)
            )
            return wrong, x
        if self.mutation == "dimension off by one":
            return layer, x * (d / max(d - 1, 1)) ** 0.5
        if self.mutation == "gain dropped":
            return replace(layer, weight=None), x
        if self.mutation == "centring dropped":
            return replace(layer, kind="rms_norm"), x
        return layer, x

    def _diagonal(self, x: Tensor) -> Tensor:
        """Return diag(gamma)/s, what is left without the rank-one terms, by its diagonal."""
        weight = torch.ones_like(x) if self.weight is None else self.weight.expand_as(x)
        return weight / self.denominator(x)[..., None]

    def jacobian(self, x: Tensor) -> Tensor:
        """Return a wrong Jacobian."""
        if self.mutation == "term dropped":
            return torch.diag_embed(self._diagonal(x))
        layer, x = self._wrong(x)
        return layer.jacobian(x)

    def singular_values(self, x: Tensor) -> Tensor:
        """Return wrong singular values."""
        if self.mutation == "term dropped":
            return self._diagonal(x).abs().sort(-1, descending=True).values
        layer, x = self._wrong(x)
        return layer.singular_values(x)

    def sigma(self, x: Tensor) -> Tensor:
        """Return a wrong largest singular value."""
        if self.mutation == "term dropped":
            return self._diagonal(x).abs().amax(-1)
        layer, x = self._wrong(x)
        return layer.sigma(x)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return wrong bounds."""
        layer, x = self._wrong(x)
        lower, upper = layer.bounds(x)
        factors = {"bound tightened": (1.001, 0.999), "bound loosened": (0.999, 1.001)}
        down, up = factors.get(self.mutation, (1.0, 1.0))
        return (upper, lower) if self.mutation == "inequality turned" else (lower * down, upper * up)


def killed(id: str, mutation: str) -> bool:
    """Tell whether a claim's check fails when its formulas are mutated."""
    found = PROPERTIES[id](ROUNDS, partial(Mutant, mutation=mutation))
    return any(not e.passed for e in found)


def formula_mutants(id: str) -> list[Evidence]:
    """Return one piece of evidence with every mutant of the claim's formulas; none where there are none."""
    if id not in MUTATIONS:
        return []
    controls = [control(f"formula with {m}", m, killed(id, m)) for m in MUTATIONS[id]]
    detail = {
        "against": "mutated formulas under the same check: each must be noticed",
        "n": len(controls),
        "negative_controls": controls,
    }
    return [Evidence("property", "pass" if all(c["rejected"] for c in controls) else "fail", detail)]
