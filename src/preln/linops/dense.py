"""The slow dense oracle: build the matrix, decompose it whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from preln.linops.operator import LinearOperator


def dense_matrix(operator: LinearOperator) -> Float[Tensor, "*batch m n"]:
    """The matrix of an operator, one product with a unit vector for each of its n columns.

    >>> from preln.linops.operator import matrix_operator
    >>> dense_matrix(matrix_operator(torch.tensor([[1.0, 2.0]]))).tolist()
    [[1.0, 2.0]]
    """
    m, n = operator.shape
    lead = operator.in_shape[: operator.batch]
    columns = []
    for j in range(n):
        unit = torch.zeros(*lead, n, dtype=operator.dtype, device=operator.device)
        unit[..., j] = 1.0
        columns.append(operator.matvec(unit.reshape(operator.in_shape)).detach().reshape(*lead, m))
    return torch.stack(columns, dim=-1)


def dense_jacobian(function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"]) -> Float[Tensor, "m n"]:
    """The Jacobian of ``function`` at ``x`` row by row from ``torch.autograd.functional.jacobian``.

    Shares no code with the products of `jacobian_operator`.
    """
    jacobian = torch.autograd.functional.jacobian(function, x.detach())
    return jacobian.reshape(-1, x.numel())


def dense_sigma(operator: LinearOperator) -> Float[Tensor, "*batch"]:
    """Largest singular value of each map, by a full singular value decomposition of `dense_matrix`."""
    return torch.linalg.svdvals(dense_matrix(operator))[..., 0]
