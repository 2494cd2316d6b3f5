from __future__ import annotations

import torch

from preln.linops.basis import Basis


def filled(count, size=20, batch=2, dtype=torch.float64):
    basis = Basis(batch, size, dtype=dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # each vector is close to the one before: one projection alone would lose half the digits
    vector = torch.randn(batch, size, generator=generator, dtype=dtype)
    for _ in range(count):
        vector = basis.without(vector)
        vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        basis.append(vector)
        vector = vector + 1e-5 * torch.randn(batch, size, generator=generator, dtype=dtype)
    return basis


def test_the_vectors_stay_orthonormal_while_the_memory_grows():
    basis = filled(18)
    assert basis.vectors.shape == (2, 18, 20)
    gram = basis.vectors @ basis.vectors.mT
    torch.testing.assert_close(gram, torch.eye(18).double().expand(2, 18, 18), atol=1e-13, rtol=0)


def test_without_leaves_what_the_dense_projection_leaves():
    basis = filled(7)
    vector = torch.randn(2, 20, dtype=torch.float64)
    q = basis.vectors
    expected = vector - torch.einsum("bkn,bk->bn", q, torch.einsum("bkn,bn->bk", q, vector))
    torch.testing.assert_close(basis.without(vector), expected)
    inside = basis.combine(torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(inside, q[:, :5].sum(dim=1))
    torch.testing.assert_close(basis.without(inside), torch.zeros_like(inside), atol=1e-14, rtol=0)


def test_negative_control_one_projection_is_not_enough():
    basis = filled(2)
    first = basis.vectors[:, 0]
    near = first + 1e-9 * torch.randn(2, 20, dtype=torch.float64)
    once = near - (near * first).sum(dim=1, keepdim=True) * first
    off = (once / torch.linalg.vector_norm(once, dim=1, keepdim=True) * first).sum(dim=1).abs().max()
    rest = basis.without(near)
    unit = rest / torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    assert off > 1e-10 > 1e3 * (unit * first).sum(dim=1).abs().max()
