from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.linops import dense_sigma, jacobian_operator, largest_singular_value, matrix_operator


def test_against_scipy_on_a_jacobian():
    x = torch.randn(5, 8, dtype=torch.float64)
    w = torch.randn(8, 8, dtype=torch.float64)
    operator = jacobian_operator(lambda z: torch.softmax(z @ z.T, dim=-1) @ torch.tanh(z @ w), x)

    def numpy_product(product):
        return lambda v: product(torch.from_numpy(np.asarray(v).reshape(5, 8))).reshape(-1).numpy()

    svds = scipy.sparse.linalg.svds(
        scipy.sparse.linalg.LinearOperator(
            operator.shape,
            matvec=numpy_product(operator.matvec),
            rmatvec=numpy_product(operator.rmatvec),
            dtype=np.float64,
        ),
        k=1,
        return_singular_vectors=False,
    )
    found = largest_singular_value(operator, rtol=1e-9)
    assert found.converged
    np.testing.assert_allclose(found.sigma.item(), svds[0], rtol=1e-9)
    torch.testing.assert_close(found.sigma[0], dense_sigma(operator))


@given(m=st.integers(1, 7), n=st.integers(1, 7), rank=st.integers(0, 7), seed=st.integers(0, 10_000))
def test_any_rank_and_shape_equals_the_dense_svd(m, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    r = min(rank, m, n)
    left = torch.randn(m, r, generator=generator, dtype=torch.float64)
    right = torch.randn(r, n, generator=generator, dtype=torch.float64)
    operator = matrix_operator(left @ right)
    found = largest_singular_value(operator, rtol=1e-12)
    torch.testing.assert_close(found.sigma[0], dense_sigma(operator), rtol=1e-9, atol=1e-12)


def test_identities_of_the_triple():
    matrix = torch.randn(9, 5, dtype=torch.float64)
    found = largest_singular_value(matrix_operator(matrix), rtol=1e-10)
    u, v = found.left[0], found.right[0]
    torch.testing.assert_close(matrix @ v, found.sigma[0] * u)
    torch.testing.assert_close(torch.linalg.vector_norm(u), torch.tensor(1.0, dtype=torch.float64))
    residual = torch.linalg.vector_norm(matrix.T @ u - found.sigma[0] * v)
    torch.testing.assert_close(residual, found.residual[0], rtol=1e-6, atol=1e-10)


def test_the_reported_residual_is_the_true_one_before_convergence():
    matrix = torch.randn(40, 40, dtype=torch.float64)
    found = largest_singular_value(matrix_operator(matrix), rtol=1e-12, max_products=4)
    assert not found.converged and found.products == 4
    u, v = found.left[0], found.right[0]
    true = torch.linalg.vector_norm(matrix.T @ u - found.sigma[0] * v)
    torch.testing.assert_close(found.residual[0], true)
    assert found.sigma[0] < torch.linalg.svdvals(matrix)[0]  # a Ritz value bounds from below


def test_a_batch_with_a_zero_map_and_unequal_ranks():
    matrices = torch.randn(3, 6, 6, dtype=torch.float64)
    matrices[1] = 0.0
    matrices[2] = torch.outer(matrices[2, 0], matrices[2, 1])
    operator = matrix_operator(matrices)
    found = largest_singular_value(operator, rtol=1e-10)
    torch.testing.assert_close(found.sigma, dense_sigma(operator), rtol=1e-9, atol=1e-12)


def test_negative_control_a_product_without_its_transpose_gives_another_value():
    matrix = torch.triu(torch.ones(6, 6, dtype=torch.float64))
    wrong = matrix_operator(matrix)
    broken = type(wrong)(
        wrong.matvec, wrong.matvec, wrong.in_shape, wrong.out_shape, wrong.dtype, wrong.device
    )
    found = largest_singular_value(broken, rtol=1e-10)
    true = torch.linalg.svdvals(matrix)[0]
    u, v = found.left[0], found.right[0]
    assert torch.linalg.vector_norm(matrix.T @ u - found.sigma[0] * v) > 1e-2 * true


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        largest_singular_value(matrix_operator(torch.full((3, 3), float("nan"))))
    with pytest.raises(InputError, match="at least one"):
        largest_singular_value(matrix_operator(torch.eye(3)), max_products=0)
