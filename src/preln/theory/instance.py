"""One concrete vector, exactly: a layer's Jacobian by plain differentiation, and its sigma.

Counterexamples are evaluated here, apart from the formulas proved elsewhere: the definition is written out
entry by entry for the given numbers and differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp


def output(layer: str, x: Sequence[sp.Expr], eps: sp.Expr) -> list[sp.Expr]:
    """Return the entries of the layer's output, without gain."""
    n = sp.Integer(len(x))
    if layer == "layer_norm":
        mean = sum(x) / n
        x = [e - mean for e in x]
    square = sum(e**2 for e in x) / n
    denominator = sp.sqrt(square) + eps if layer == "rms_norm_outside" else sp.sqrt(square + eps)
    return [e / denominator for e in x]


def jacobian(layer: str, x: Sequence[sp.Expr], eps: sp.Expr) -> sp.Matrix:
    """Return the Jacobian at x, by differentiating the written-out definition."""
    symbols = sp.symbols(f"x0:{len(x)}", real=True)
    at = dict(zip(symbols, (sp.sympify(e) for e in x), strict=True))
    y = output(layer, symbols, sp.sympify(eps))
    return sp.Matrix(
        len(x), len(x), lambda a, b: sp.nsimplify(sp.simplify(sp.diff(y[a], symbols[b]).subs(at)))
    )


def sigma(matrix: sp.Matrix) -> sp.Expr:
    """Return the largest singular value, exactly."""
    return sp.sqrt(sp.Max(*[sp.simplify(value) for value in (matrix.T * matrix).eigenvals()]))


def sigma_at(layer: str, x: Sequence[sp.Expr], eps: sp.Expr) -> sp.Expr:
    """Return the largest singular value of the layer's Jacobian at x, exactly."""
    return sp.simplify(sigma(jacobian(layer, x, eps)))
