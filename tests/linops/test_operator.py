from __future__ import annotations

import pytest
import torch

from preln.base.errors import InputError
from preln.linops import (
    LinearOperator,
    compose,
    dense_jacobian,
    dense_matrix,
    forward_mode_jacobian,
    jacobian_operator,
    matrix_operator,
    minus_identity,
    restricted,
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


def test_products_of_operators():
    a, b, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (3, 5), (5, 4)))
    product = compose(*map(matrix_operator, (a, b, c)))
    assert product.shape == (2, 4)
    torch.testing.assert_close(dense_matrix(product), a @ b @ c)
    u, v = torch.randn(2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close((u * product.matvec(v)).sum(), (product.rmatvec(u) * v).sum())
    with pytest.raises(InputError, match="fit each other"):
        compose(matrix_operator(c), matrix_operator(a))


def test_chain_rule():
    x = torch.randn(4, dtype=torch.float64)
    inner = jacobian_operator(torch.tanh, x)
    outer = jacobian_operator(curved, torch.tanh(x))
    both = dense_jacobian(lambda z: curved(torch.tanh(z)), x)
    torch.testing.assert_close(dense_matrix(compose(outer, inner)), both)


def test_restriction_is_the_corner_of_the_matrix():
    matrix, keep = torch.randn(4, 4, dtype=torch.float64), torch.tensor([1.0, 0, 1, 1])
    projection = torch.diag(keep.double())
    part = restricted(matrix_operator(matrix), keep)
    torch.testing.assert_close(dense_matrix(part), projection @ matrix @ projection)
    torch.testing.assert_close(
        dense_matrix(minus_identity(part)), projection @ (matrix - torch.eye(4).double()) @ projection
    )


class _Once(torch.autograd.Function):
    """Has a first derivative only, as fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


def test_a_function_without_a_second_derivative_is_refused():
    with pytest.raises(InputError, match="eager attention"):
        jacobian_operator(_Once.apply, torch.randn(3)).matvec(torch.ones(3))
    with pytest.raises(InputError, match="eager attention"):
        query = torch.randn(1, 1, 4, 8)
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
        with torch.nn.attention.sdpa_kernel(flash):
            jacobian_operator(
                lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), query
            ).matvec(query)


def test_other_errors_of_a_function_pass():
    def broken(x):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        jacobian_operator(broken, torch.randn(3))
