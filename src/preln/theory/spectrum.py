"""The spectrum, for every d, of a multiple of I (or of the centring projector) plus rank one.

`Spectrum.prove` is given orthogonal spaces: a line spanned by a known vector, or "everything orthogonal to
those vectors". It shows by index contraction that the matrix is symmetric, that each space is an eigenspace,
and that the known vectors are orthogonal to each other; the dimensions add up to d, so the spaces are all of
R^d. As a second, separate account of the multiplicities, the traces of M and of M^2 must equal the
multiplicity-weighted sums of the eigenvalues and of their squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp

from preln.theory.evidence import Symbolic
from preln.theory.index import Entry, Facts, Matrix, apply, d, dot, i, j, product, trace, vector

v = vector("v")


@dataclass(frozen=True)
class Eigenspace:
    """An eigenvalue and where it lives.

    Attributes:
        value: the eigenvalue.
        multiplicity: the dimension of the space (an expression in d).
        line: the entries of the vector that spans it; None for the orthogonal complement of all lines.
        name: how to call the space in the ledger.
    """

    value: sp.Expr
    multiplicity: sp.Expr
    line: Entry | None
    name: str


@dataclass(frozen=True)
class Spectrum:
    """Eigenspaces of a symmetric matrix, complete by `prove`."""

    spaces: tuple[Eigenspace, ...]

    def prove(
        self, matrix: Matrix, facts: Facts, orthogonality: Sequence[sp.Symbol], proof: Symbolic
    ) -> None:
        """Add to `proof` the steps that make this the whole spectrum of `matrix`.

        Args:
            matrix: entries of a matrix.
            facts: values of inner products of the vectors in `matrix`.
            orthogonality: the inner products with the generic vector v that vanish on the complement.
            proof: collects the steps.
        """
        proof.equal("symmetric", matrix(i, j), matrix(j, i), facts)
        for space in self.spaces:
            u = space.line or (lambda k: v[k])
            known = dict(facts) | (dict.fromkeys(orthogonality, sp.S.Zero) if space.line is None else {})
            proof.equal(f"eigen-equation on {space.name}", apply(matrix, u)(i), space.value * u(i), known)
        lines = [space for space in self.spaces if space.line is not None]
        for first in range(len(lines)):
            for second in range(first + 1, len(lines)):
                a, b = lines[first], lines[second]
                proof.equal(f"{a.name} orthogonal to {b.name}", dot(a.line, b.line), sp.S.Zero, facts)
        proof.true("every line has dimension 1", all(space.multiplicity == 1 for space in lines))
        proof.true("the complement's conditions are as many as the lines", len(orthogonality) == len(lines))
        proof.equal("dimensions add up to d", sum(space.multiplicity for space in self.spaces), d)
        moments = [sum(space.multiplicity * space.value**power for space in self.spaces) for power in (1, 2)]
        proof.equal("trace", trace(matrix), moments[0], facts)
        proof.equal("trace of the square", trace(product(matrix, matrix)), moments[1], facts)

    def largest(self) -> sp.Expr:
        """Return the largest |eigenvalue| as a Piecewise in d: spaces of dimension 0 do not count."""
        magnitudes = [(sp.Abs(space.value), sp.Gt(space.multiplicity, 0)) for space in self.spaces]
        best = sp.S.Zero
        for magnitude, present in magnitudes:
            best = sp.Max(
                best,
                magnitude if present == sp.true else sp.Piecewise((magnitude, present), (0, True)),
                evaluate=False,
            )
        return best

    def as_list(self) -> list[dict[str, str]]:
        """Return the spectrum as plain data for the ledger."""
        return [
            {"value": str(s.value), "multiplicity": str(s.multiplicity), "space": s.name} for s in self.spaces
        ]
