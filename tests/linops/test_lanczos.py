from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.linops import (
    dense_sigma,
    extreme_singular_values,
    jacobian_operator,
    largest_singular_value,
    matrix_operator,
    restricted,
)


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


@given(seed=st.integers(0, 10_000), n=st.integers(1, 7))
def test_both_ends_of_the_spectrum_equal_the_dense_ones(seed, n):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    top, bottom = extreme_singular_values(matrix_operator(matrix), rtol=1e-10, both=True)
    singular = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(top.sigma[0], singular[0])
    torch.testing.assert_close(bottom.sigma[0], singular[-1], rtol=1e-6, atol=1e-10)


def test_the_smallest_ritz_value_is_an_upper_bound_with_its_true_residual():
    matrix = torch.randn(60, 60, dtype=torch.float64)
    operator, last = matrix_operator(matrix), float("inf")
    least = torch.linalg.svdvals(matrix)[-1]
    for products in (2, 5, 10, 30, 60):
        bottom = extreme_singular_values(operator, rtol=1e-9, max_products=products, both=True)[1]
        u, v = bottom.left[0], bottom.right[0]
        torch.testing.assert_close(matrix @ v, bottom.sigma[0] * u, rtol=1e-8, atol=1e-8)
        true = torch.linalg.vector_norm(matrix.T @ u - bottom.sigma[0] * v)
        torch.testing.assert_close(true, bottom.residual[0], rtol=1e-6, atol=1e-10)
        assert least * (1 - 1e-9) <= bottom.sigma[0] <= last
        last = bottom.sigma[0]
    torch.testing.assert_close(last, least, rtol=1e-6, atol=1e-9)


def test_negative_control_an_early_smallest_value_is_flagged_by_its_residual():
    matrix = torch.randn(60, 60, dtype=torch.float64)
    top, bottom = extreme_singular_values(matrix_operator(matrix), rtol=1e-2, max_products=40)
    assert top.converged and not bottom.converged
    assert bottom.sigma[0] > 1.5 * torch.linalg.svdvals(matrix)[-1]
    assert bottom.residual[0] > 0.1 * bottom.sigma[0]


def test_a_singular_map_has_a_smallest_value_of_zero():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    bottom = extreme_singular_values(matrix_operator(matrix), both=True)[1]
    assert bottom.sigma.item() == pytest.approx(0.0, abs=1e-12)
    nothing = extreme_singular_values(matrix_operator(0 * matrix))
    assert [t.sigma.item() for t in nothing] == [0.0, 0.0] and nothing[0].converged


def test_a_map_does_not_depend_on_its_batch():
    matrices = torch.randn(4, 30, 30, dtype=torch.float64)
    matrices[1, :, 0] *= 50  # converges early
    together = largest_singular_value(matrix_operator(matrices))
    assert len(set(together.steps.tolist())) > 1
    for row, matrix in enumerate(matrices):
        alone = largest_singular_value(matrix_operator(matrix))
        assert alone.steps[0] == together.steps[row]
        torch.testing.assert_close(alone.sigma[0], together.sigma[row], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.right[0], together.right[row], rtol=1e-8, atol=1e-10)


def test_a_good_start_saves_products_and_changes_nothing():
    matrix = torch.randn(80, 80, dtype=torch.float64)
    operator = matrix_operator(matrix)
    cold = largest_singular_value(operator, rtol=1e-8, max_products=80)
    warm = largest_singular_value(operator, rtol=1e-8, max_products=80, start=cold.right + 1e-4)
    assert warm.products < cold.products
    torch.testing.assert_close(warm.sigma, cold.sigma)
    with pytest.raises(InputError, match="start vector"):
        largest_singular_value(operator, start=torch.zeros(80))


def test_on_a_subspace_the_rest_does_not_count_as_zero():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    keep = torch.tensor([1.0, 1, 1, 1, 0, 0])
    top, bottom = extreme_singular_values(restricted(matrix_operator(matrix), keep), rtol=1e-10, both=True)
    singular = torch.linalg.svdvals(matrix[:4, :4])
    torch.testing.assert_close(top.sigma[0], singular[0])
    torch.testing.assert_close(bottom.sigma[0], singular[-1])


def test_negative_control_a_start_at_the_second_vector_stops_there():
    """Why stacks start from random vectors only: a start that is too good hides what it is not."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.rand(398, generator=generator, dtype=torch.float64)
    matrix = torch.diag(torch.cat([torch.tensor([1.1, 1.0], dtype=torch.float64), rest]))
    noise = torch.randn(1, 400, generator=generator, dtype=torch.float64)
    start = 1e-3 * noise / torch.linalg.vector_norm(noise)
    start[0, 1] += 1.0
    misled = largest_singular_value(matrix_operator(matrix), start=start)
    assert misled.converged and misled.sigma.item() < 1.01
    fair = largest_singular_value(matrix_operator(matrix))
    assert fair.sigma.item() == pytest.approx(1.1, rel=1e-3)
