"""Index notation for a symbolic dimension d: derivatives, contractions and a normal form.

A vector is an `IndexedBase`, a layer is the formula of its i-th output, and a sum over an index runs from 1
to d with d a symbol. Nothing here ever picks a number for d, so an identity that reduces to zero holds for
every dimension at once.

SymPy also offers `MatrixSymbol` calculus. It is not used: SymPy 1.14 differentiates `X/sqrt((X.T*X)[0, 0]/d +
eps)` by `X` as if the scalar did not depend on `X`, and so loses the rank-one term without a word
(`matrix_symbol_derivative` shows it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy as sp

from preln.base.errors import InputError

Entry = Callable[[sp.Symbol], sp.Expr]
"""A vector by its entries: index -> expression."""
Matrix = Callable[[sp.Symbol, sp.Symbol], sp.Expr]
"""A matrix by its entries: row index, column index -> expression."""
Facts = Mapping[sp.Expr, sp.Expr]
"""Values of named inner products, such as `{inner(x, x): d * ms}`."""

d = sp.Symbol("d", integer=True, positive=True)
i = sp.Symbol("i", integer=True, positive=True)
j = sp.Symbol("j", integer=True, positive=True)


def vector(name: str) -> sp.IndexedBase:
    """Return a real vector of R^d; `vector("x")[i]` is its i-th entry."""
    return sp.IndexedBase(name, real=True)


def total(term: Entry) -> sp.Sum:
    """Return the sum of `term(k)` over k = 1..d, with a fresh index that no other sum shares."""
    k = sp.Dummy("k", integer=True, positive=True)
    return sp.Sum(term(k), (k, 1, d))


def delta(a: sp.Expr, b: sp.Expr) -> sp.Expr:
    """Return Kronecker's delta of two indices."""
    return sp.KroneckerDelta(a, b)


def inner(*vectors: sp.IndexedBase) -> sp.Symbol:
    """Name the scalar `sum_k u_k v_k …`: `<u,v>`, or `<1,x>` for a single vector.

    The name does not depend on the order. A vector with itself is nonnegative.
    """
    names = sorted(str(v.label if isinstance(v, sp.IndexedBase) else v) for v in vectors)
    if len(names) == 1:
        names = ["1", *names]
    square = len(names) == 2 and names[0] == names[1]
    return sp.Symbol(f"<{','.join(names)}>", real=True, nonnegative=True if square else None)


def contract(expr: sp.Expr) -> sp.Expr:
    """Carry out every sum over an index in `expr`.

    Products are expanded; a Kronecker delta eats its index; factors without the index move out; a summand
    without the index counts d times; what remains is a product of vector entries and becomes a named inner
    product. Free indices are taken to lie in 1..d.

    Raises:
        InputError: a sum does not run from 1 to d, or its summand is not a polynomial in vector entries.
    """
    expr = sp.sympify(expr)
    if not expr.has(sp.Sum):
        return expr
    if isinstance(expr, sp.Sum):
        body, *limits = expr.args
        for k, low, high in limits:
            if low != 1 or high != d:
                raise InputError(f"sum over {k} runs from {low} to {high}: sums must run from 1 to d")
            body = sp.Add(*[_contract_term(term, k) for term in sp.Add.make_args(sp.expand(contract(body)))])
        return body
    return expr.func(*[contract(arg) for arg in expr.args])


def _contract_term(term: sp.Expr, k: sp.Symbol) -> sp.Expr:
    """Sum one expanded product over k = 1..d."""
    outside, names = [], []
    factors = sp.Mul.make_args(term)
    for position, factor in enumerate(factors):
        if isinstance(factor, sp.KroneckerDelta) and factor.has(k):
            other = factor.args[1] if factor.args[0] == k else factor.args[0]
            return sp.Mul(*factors[:position], *factors[position + 1 :]).subs(k, other)
    for factor in factors:
        base, power = factor.as_base_exp()
        if not factor.has(k):
            outside.append(factor)
        elif isinstance(base, sp.Indexed) and base.indices == (k,) and power.is_Integer and power > 0:
            names += [base.base] * int(power)
        else:
            raise InputError(
                f"cannot sum {factor} over {k}: only products of vector entries can be contracted"
            )
    return sp.Mul(*outside) * (inner(*names) if names else d)


def differentiate(y: sp.Expr, x: sp.IndexedBase, index: sp.Symbol = j) -> sp.Expr:
    """Return `dy/dx_index` of a layer's output `y = y_i(x)`, with every sum carried out.

    The rule behind it is `dx_i/dx_j = delta_ij` inside and outside sums (SymPy's derivative by an `Indexed`).
    """
    return contract(sp.diff(y, x[index]))


def apply(matrix: Matrix, v: Entry) -> Entry:
    """Return the vector `matrix @ v`."""
    return lambda row: contract(total(lambda k: matrix(row, k) * v(k)))


def product(a: Matrix, b: Matrix) -> Matrix:
    """Return the matrix `a @ b`."""
    return lambda row, column: contract(total(lambda k: a(row, k) * b(k, column)))


def dot(u: Entry, v: Entry) -> sp.Expr:
    """Return the inner product of two vectors given by their entries."""
    return contract(total(lambda k: u(k) * v(k)))


def trace(matrix: Matrix) -> sp.Expr:
    """Return the trace of a matrix."""
    return contract(total(lambda k: matrix(k, k)))


def normal(expr: sp.Expr, facts: Facts | None = None) -> sp.Expr:
    """Bring an index expression to normal form: contracted, with `facts` put in, one reduced fraction.

    Vector entries with free indices, deltas of free indices and the remaining scalars are independent
    indeterminates of a rational function, so the normal form is 0 exactly if the machinery can see that the
    expression vanishes. Polynomials in noncommuting symbols, which stand for matrices, are expanded.
    """
    facts = dict(facts or {})
    if not sp.sympify(expr).is_commutative:
        return sp.expand(sp.expand(expr).subs(facts))
    result = contract(expr).subs(facts)
    # Under a fractional power the argument must be reduced first, or sqrt((d*ms)/d + eps) hides that it is s.
    result = result.replace(
        lambda e: isinstance(e, sp.Pow) and not e.exp.is_Integer, lambda e: sp.cancel(e.base) ** e.exp
    )
    return sp.cancel(sp.together(result))


def vanishes(expr: sp.Expr, facts: Facts | None = None) -> bool:
    """Tell whether an index expression is identically zero under `facts`."""
    return normal(expr, facts) == 0


def without(matrix: Matrix, x: sp.IndexedBase) -> Matrix:
    """Return the matrix with every entry of the vector `x` set to zero."""

    def entry(row: sp.Symbol, column: sp.Symbol) -> sp.Expr:
        return matrix(row, column).replace(
            lambda e: isinstance(e, sp.Indexed) and e.base == x, lambda e: sp.S.Zero
        )

    return entry


def matrix_symbol_derivative(size: int = 2) -> sp.Matrix:
    """Return what SymPy's `MatrixSymbol` calculus answers for RMSNorm's Jacobian at a fixed size.

    Kept as a negative control: the answer lacks the rank-one term, and `vanishes` must reject it.
    """
    eps = sp.Symbol("eps", positive=True)
    x = sp.MatrixSymbol("X", size, 1)
    y = x / sp.sqrt((x.T * x)[0, 0] / size + eps)
    derivative = y.diff(x)
    return sp.Matrix(size, size, lambda row, column: sp.simplify(derivative[row, column].doit()))
