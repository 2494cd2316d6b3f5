"""Sigma on more than 10,000 random and adversarial cases of each layer, d from 1 to 64."""

import pytest
import torch

from preln.testing import NormLayer
from preln.testing.layers import KINDS

from . import oracle, reference


def relative(actual, expected, unit):
    """Errors relative to sigma; relative to |gamma|_(1)/s where sigma is 0."""
    scale = torch.where(expected > 0, expected, torch.where(unit > 0, unit, 1.0))
    return ((actual.double() - expected).abs() / scale).nan_to_num(torch.inf)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_to_12_digits(kind):
    """Every row agrees with the dense reference; if one does not, 80 digits say which of the two is off."""
    checked, small, worst = 0, 0, 0.0
    for layer, x in reference.cases(kind, seed=30, dimensions=range(1, 65)):
        expected, unit = reference.sigma(layer, x)
        errors = relative(layer.sigma(x), expected, unit)
        checked += len(x)
        small += int((expected < 1e-3 * unit).sum())
        at = int(errors.argmax())
        worst = max(worst, float(errors[at]))
        if errors[at] > 1e-12:
            exact = oracle.sigma(kind, x[at].tolist(), layer.weight.tolist(), layer.eps)
            pytest.fail(
                f"{layer} at {x[at].tolist()}: sigma {layer.sigma(x)[at].item():.17g}, dense "
                f"{expected[at].item():.17g}, 80 digits {exact:.17g}; worst so far {worst:.1e}"
            )
    # Cases in which sigma is far below |gamma|_(1)/s must be among them: they are the hard ones.
    assert checked > 10_000 and small > 200


@pytest.mark.parametrize("kind", KINDS)
def test_float32_to_5_digits(kind):
    """Float32 vectors and gains against the float64 reference at the same numbers."""
    checked = 0
    for layer, x in reference.cases(kind, seed=31, dimensions=range(1, 65, 2)):
        x, single = x.float(), NormLayer(kind, layer.eps, layer.weight.float())
        x = x.nan_to_num(0.0)
        expected, unit = reference.sigma(single, x)
        # Below 1e-30 float32 itself runs out of digits.
        usual = (expected == 0) | (expected > 1e-30)
        sigma = single.sigma(x)
        assert sigma.dtype == torch.float32
        errors = relative(sigma, expected, unit)[usual]
        assert (errors <= 1e-5).all(), (single, errors.max())
        checked += int(usual.sum())
    assert checked > 5_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_matches_80_digits(kind):
    checked = 0
    for layer, x in reference.cases(kind, seed=32, dimensions=range(1, 5)):
        expected, _ = reference.sigma(layer, x)
        for row, value in zip(x[::2], expected[::2], strict=True):
            exact = oracle.sigma(kind, row.tolist(), layer.weight.tolist(), layer.eps)
            assert value.item() == pytest.approx(exact, rel=2e-14, abs=0), (layer, row)
            checked += 1
    assert checked > 300


def test_a_dense_matrix_that_cancels_is_no_reference():
    """Negative control: I - (1 - t) u u^T written down as it stands loses the small cases."""
    lost = 0
    for layer, x in reference.cases("layer_norm", seed=30, dimensions=range(3, 12)):
        expected, unit = reference.sigma(layer, x)
        plain = torch.linalg.svdvals(layer.jacobian(x))[:, 0]
        lost += int((relative(plain, expected, unit) > 1e-12).sum())
    assert lost > 5
