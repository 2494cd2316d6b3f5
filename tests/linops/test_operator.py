from __future__ import annotations

import pytest
import torch

from preln.base.errors import InputError
from preln.linops import (
    LinearOperator,
    dense_jacobian,
    dense_matrix,
    forward_mode_jacobian,
    jacobian_operator,
    matrix_operator,
    minus_identity,
)

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def curved(x: torch.Tensor) -> torch.Tensor:
    """[..., 4] -> [..., 6], neither linear nor square."""
    return torch.tanh(x @ W.T) + (x**2).sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("build", [jacobian_operator, forward_mode_jacobian])
def test_products_equal_the_dense_jacobian(build):
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(dense_matrix(build(curved, x)), dense_jacobian(curved, x))


@pytest.mark.parametrize("build", [jacobian_operator, forward_mode_jacobian])
def test_adjoint_identity(build):
    x = torch.randn(3, 4, dtype=torch.float64)
    operator = build(curved, x)
    u, v = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close((u * operator.matvec(v)).sum(), (operator.rmatvec(u) * v).sum())


def test_adjoint_identity_rejects_a_wrong_adjoint():
    matrix = torch.randn(4, 4, dtype=torch.float64)
    right = matrix_operator(matrix)
    wrong = LinearOperator(
        right.matvec, right.matvec, right.in_shape, right.out_shape, matrix.dtype, right.device
    )
    u, v = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert not torch.isclose((u * wrong.matvec(v)).sum(), (wrong.rmatvec(u) * v).sum())


def test_batched_jacobian_is_that_of_each_row():
    x = torch.randn(3, 4, dtype=torch.float64)
    stacked = dense_matrix(jacobian_operator(curved, x, batch=1))
    assert stacked.shape == (3, 6, 4)
    for row, matrix in zip(x, stacked, strict=True):
        torch.testing.assert_close(matrix, dense_jacobian(curved, row))


def test_minus_identity():
    x = torch.randn(4, dtype=torch.float64)
    operator = minus_identity(jacobian_operator(lambda z: z + torch.tanh(z), x))
    torch.testing.assert_close(dense_matrix(operator), torch.diag(1 - torch.tanh(x) ** 2))
    with pytest.raises(InputError, match="equal shapes"):
        minus_identity(jacobian_operator(curved, x))


def test_a_constant_function_is_refused():
    with pytest.raises(InputError, match="does not depend"):
        jacobian_operator(lambda z: torch.ones(3), torch.randn(4))


def test_batch_axes_must_agree():
    with pytest.raises(InputError, match="batch axes"):
        LinearOperator(lambda v: v, lambda u: u, torch.Size([2, 3]), torch.Size([3, 3]), torch.float32,
                       torch.device("cpu"), batch=1)  # fmt: skip
