"""Matrix-free linear algebra on Jacobians: products, Lanczos, and the slow dense oracle."""

from __future__ import annotations

from preln.linops.dense import dense_jacobian, dense_matrix, dense_sigma
from preln.linops.lanczos import SingularTriple, largest_singular_value
from preln.linops.operator import (
    LinearOperator,
    forward_mode_jacobian,
    jacobian_operator,
    matrix_operator,
    minus_identity,
)

__all__ = [
    "LinearOperator",
    "SingularTriple",
    "dense_jacobian",
    "dense_matrix",
    "dense_sigma",
    "forward_mode_jacobian",
    "jacobian_operator",
    "largest_singular_value",
    "matrix_operator",
    "minus_identity",
]
