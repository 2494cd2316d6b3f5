from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preln.probe.bounds import (
    blk_after,
    blk_parallel,
    blk_post,
    blk_pre,
    blk_sandwich,
    bounded_exp,
    stk_upper,
    strength,
    tightness,
    weyl_smallest,
)

SEEDS = st.integers(0, 10_000)


def matrices(seed, count=4, scale=0.6, d=5):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(count)]


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)[None]


def check(jacobian, bounds, *, rtol=1e-12):
    singular = torch.linalg.svdvals(jacobian)
    eye = torch.eye(len(jacobian), dtype=jacobian.dtype)
    assert singular[0] <= bounds.block * (1 + rtol)
    if bounds.update is not None:
        assert norm(jacobian - eye) <= bounds.update * (1 + rtol)
    if bounds.smallest is not None:
        assert singular[-1] >= bounds.smallest - rtol
        assert singular[-1] >= weyl_smallest(norm(jacobian - eye)) - rtol


@given(seed=SEEDS, scale=st.sampled_from([0.01, 0.1, 0.6, 3.0]))
def test_the_claims_hold_on_matrices(seed, scale):
    a1, g1, a2, g2 = matrices(seed, scale=scale)
    eye = torch.eye(5, dtype=torch.float64)
    m1, m2 = strength(norm(a1), norm(g1)), strength(norm(a2), norm(g2))
    check((eye + a2 @ g2) @ (eye + a1 @ g1), blk_pre([m1, m2]))
    check(eye + a1 @ g1 + a2 @ g2, blk_parallel([m1, m2]))
    check(eye + (a1 + a2) @ g1, blk_parallel([strength(norm(a1 + a2), norm(g1))]))
    check((eye + g2 @ a2) @ (eye + g1 @ a1), blk_after([m1, m2]))
    check(eye + g2 @ a1 @ g1, blk_sandwich([strength(norm(a1), norm(g1), norm(g2))]))
    check(g2 @ (eye + a2) @ g1 @ (eye + a1), blk_post([norm(a1), norm(a2)], [norm(g1), norm(g2)]))


def test_multiples_of_the_identity_attain_them():
    eye = torch.eye(3, dtype=torch.float64)
    m1, m2 = torch.tensor([0.5]).double(), torch.tensor([0.25]).double()
    for sign in (1, -1):
        rising = sign > 0
        sequential = torch.linalg.svdvals((eye + sign * 0.25 * eye) @ (eye + sign * 0.5 * eye))[0]
        parallel = torch.linalg.svdvals(eye + sign * 0.75 * eye)[0]
        pre, side = blk_pre([m1, m2]), blk_parallel([m1, m2])
        torch.testing.assert_close(sequential, (pre.block if rising else pre.smallest)[0])
        torch.testing.assert_close(parallel, (side.block if rising else side.smallest)[0])
    post = blk_post([m1], [m2])
    torch.testing.assert_close(torch.linalg.svdvals(0.25 * (eye + 0.5 * eye))[0], post.block[0])
    assert post.update is None and post.smallest is None


@pytest.mark.parametrize("seed", range(3))
def test_negative_control_the_claim_of_another_placement_is_violated(seed):
    """Halves in a row lack the cross term in the parallel bound; Post-LN has no 1 to start from."""
    eye = torch.eye(3, dtype=torch.float64)
    m = torch.tensor([2.0 + seed]).double()
    in_a_row = (eye + m * eye) @ (eye + m * eye)
    assert norm(in_a_row) > blk_parallel([m, m]).block
    with pytest.raises(AssertionError):
        check(in_a_row, blk_parallel([m, m]))
    with pytest.raises(AssertionError):
        check(eye + 0.1 * eye, blk_post([m * 0], [m * 0 + 0.1]))


def test_small_strengths_keep_their_digits():
    m = torch.tensor([1e-12]).double()
    torch.testing.assert_close(blk_pre([m, m]).update, 2 * m, rtol=1e-9, atol=0)


def test_the_lower_side_is_cut_off_factor_by_factor():
    """Two factors below 0 would make a product above 0 (the refuted STK-LOWER-RAW)."""
    m = torch.tensor([3.0])
    assert blk_pre([m, m]).smallest.item() == 0.0
    assert weyl_smallest(m).item() == 0.0


def test_stack_bounds_are_tail_products_also_beyond_the_range():
    blocks = [torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([5.0])]
    assert stk_upper(blocks).exp().flatten().tolist() == pytest.approx([30.0, 15.0, 5.0])
    logs = stk_upper([torch.tensor([1e200], dtype=torch.float64)] * 3)
    assert logs[0].item() == pytest.approx(600 * math.log(10))
    assert bounded_exp(logs)[0].item() == 1e300


def test_tightness_of_nothing_is_one():
    zero, one = torch.tensor([0.0]), torch.tensor([1.0])
    assert tightness(zero, zero).item() == 1.0
    assert tightness(zero, one).item() == 0.0
    assert tightness(one, 2 * one).item() == 0.5
