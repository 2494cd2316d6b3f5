"""The strategies, assertions and tolerances that users import."""

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.testing import (
    NormLayer,
    assert_jacobian_matches,
    assert_sigma_bound,
    eps_values,
    gains,
    norm_inputs,
    norm_layers,
    tolerance,
)

X = torch.tensor([[3.0, 4.0], [1.0, -2.0]], dtype=torch.float64)
LAYER = NormLayer("rms_norm", 1e-3, torch.tensor([2.0, -1.0], dtype=torch.float64))


@given(norm_inputs(), gains(), eps_values(), norm_layers(4))
def test_what_is_drawn(x, gain, eps, layer):
    assert 1 <= len(x) <= 16 and x.isfinite().all() and x.dtype == torch.float64
    assert 1 <= len(gain) <= 16 and gain.isfinite().all()
    assert 1e-12 <= eps <= 10
    y = layer(torch.arange(4.0, dtype=torch.float64))
    assert y.shape == (4,) and y.isfinite().all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: len(x) == 1,
        lambda x: len(x) == 3 and not x.any(),
        lambda x: len(x) > 2 and x.any() and bool((x == x[0]).all()),
        lambda x: len(x) > 2 and int((x != 0).sum()) == 1,
        lambda x: float(x.abs().max()) > 1e29,
        lambda x: 0 < float(x.abs().max()) < 1e-310,
    ],
)
def test_nasty_vectors_come_up(wanted):
    assert wanted(find(norm_inputs(), wanted))


@pytest.mark.parametrize(
    "wanted",
    [
        lambda g: len(g) > 1 and len(g.unique()) < len(g),
        lambda g: len(g) > 2 and bool((g == 0).any()) and bool((g != 0).any()),
        lambda g: bool((g < 0).any()),
    ],
)
def test_nasty_gains_come_up(wanted):
    assert wanted(find(gains(), wanted))


def test_assertions_pass_where_they_should():
    assert_jacobian_matches(LAYER, X, LAYER.jacobian)
    assert_sigma_bound(LAYER, X, LAYER.sigma, side="equal")
    assert_sigma_bound(LAYER, X, lambda x: LAYER.bounds(x)[1])
    assert_sigma_bound(LAYER, X, lambda x: LAYER.bounds(x)[0], side="lower")


def test_assertions_fail_where_they_should():
    with pytest.raises(AssertionError, match=r"autograd .* expected"):
        assert_jacobian_matches(LAYER, X, LAYER.jacobian(X) * (1 + 1e-6))
    with pytest.raises(AssertionError, match="shape"):
        assert_jacobian_matches(LAYER, X, torch.zeros(2, 3, 2))
    for side, factor in (("upper", 0.999), ("lower", 1.001), ("equal", 0.999), ("equal", 1.001)):
        with pytest.raises(AssertionError, match=r"2 of 2 rows"):
            assert_sigma_bound(LAYER, X, LAYER.sigma(X) * factor, side=side)
    with pytest.raises(AssertionError):
        assert_sigma_bound(LAYER, X, float("nan"))
    with pytest.raises(InputError, match="above"):
        assert_sigma_bound(LAYER, X, 1.0, side="above")


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.floats(1.0, 1e6))
def test_tolerance_grows_with_rounding_and_conditioning(dtype, conditioning):
    assert tolerance(dtype, conditioning) == pytest.approx(tolerance(dtype) * conditioning)
    assert tolerance(dtype) >= tolerance(torch.float64)


def test_refusals():
    with pytest.raises(InputError, match="int64"):
        tolerance(torch.int64)
    with pytest.raises(InputError, match="dimension 0"):
        find(norm_inputs(0), lambda x: True)
