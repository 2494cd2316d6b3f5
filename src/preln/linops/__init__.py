"""Matrix-free linear algebra on Jacobians: products, Lanczos, and the slow dense oracle."""

from __future__ import annotations

from preln.linops.dense import dense_jacobian, dense_matrix, dense_sigma
from preln.linops.lanczos import SingularTriple, extreme_singular_values, largest_singular_value
from preln.linops.operator import (
    LinearOperator,
    compose,
    forward_mode_jacobian,
    jacobian_operator,
    matrix_operator,
    minus_identity,
    restricted,
)

__all__ = [
    "LinearOperator",
    "SingularTriple",
    "compose",
    "dense_jacobian",
    "dense_matrix",
    "dense_sigma",
    "extreme_singular_values",
    "forward_mode_jacobian",
    "jacobian_operator",
    "largest_singular_value",
    "matrix_operator",
    "minus_identity",
    "restricted",
]
