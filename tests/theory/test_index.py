"""The index calculus: contraction, differentiation, and the trap it exists to avoid."""

import pytest
import sympy as sp
import torch

from preln.base.errors import InputError
from preln.testing import NormLayer, autograd_jacobian
from preln.theory import norms
from preln.theory.index import (
    apply,
    contract,
    d,
    delta,
    differentiate,
    dot,
    i,
    inner,
    j,
    matrix_symbol_derivative,
    normal,
    total,
    trace,
    vanishes,
    vector,
)

x, u = vector("x"), vector("u")


def test_sums_become_named_inner_products():
    assert contract(total(lambda k: x[k] * u[k])) == inner(x, u) == inner(u, x)
    assert contract(total(lambda k: x[k])) == inner(x)
    assert contract(total(lambda k: sp.S.One)) == d
    assert contract(total(lambda k: delta(i, k) * x[k] ** 2 * u[j])) == x[i] ** 2 * u[j]
    assert trace(delta) == d
    nested = total(lambda k: (x[k] - total(lambda m: x[m]) / d) ** 2)
    assert vanishes(nested - (inner(x, x) - inner(x) ** 2 / d))


def test_what_cannot_be_contracted_is_refused():
    with pytest.raises(InputError, match="cannot sum"):
        contract(total(lambda k: 1 / x[k]))
    k = sp.Symbol("k", integer=True)
    with pytest.raises(InputError, match="must run from 1 to d"):
        contract(sp.Sum(x[k], (k, 1, 3)))


def test_derivatives_of_a_linear_and_a_quadratic_map():
    assert differentiate(x[i], x, j) == delta(i, j)
    assert differentiate(total(lambda k: x[k] ** 2), x, j) == 2 * x[j]
    assert apply(lambda a, b: u[a] * u[b], lambda k: x[k])(i) == u[i] * inner(u, x)
    assert dot(lambda k: x[k], lambda k: u[k]) == inner(x, u)


def test_matrix_symbol_calculus_drops_the_rank_one_term():
    """The reason for index notation, kept as a negative control."""
    trap = matrix_symbol_derivative(2)
    assert trap[0, 1] == 0, "SymPy now keeps the rank-one term: the control needs another false variant"
    derived = differentiate(norms.rms_norm(x), x, j)
    assert vanishes(derived - norms.rms_jacobian(i, j), norms.RMS_FACTS)
    assert not vanishes(derived - delta(i, j) / norms.s, norms.RMS_FACTS)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["rms_norm", "rms_norm_outside", "layer_norm"])
def test_derived_jacobians_equal_autograd(kind, dimension):
    """The symbolic derivative itself, before any closed form, filled with numbers."""
    torch.manual_seed(dimension)
    point = torch.randn(dimension, dtype=torch.float64)
    derived = differentiate(getattr(norms, kind)(norms.x), norms.x, j)
    numbers = {
        d: dimension,
        norms.eps: sp.Rational(1, 8),
        inner(norms.x, norms.x): sp.Float(float(point @ point), 20),
        inner(norms.x): sp.Float(float(point.sum()), 20),
    }
    actual = autograd_jacobian(NormLayer(kind, 0.125), point)
    for a in range(dimension):
        for b in range(dimension):
            entries = {norms.x[i]: float(point[a]), norms.x[j]: float(point[b]), delta(i, j): int(a == b)}
            value = float(normal(derived).subs(numbers | entries))
            assert value == pytest.approx(actual[a, b].item(), rel=1e-10, abs=1e-13)
