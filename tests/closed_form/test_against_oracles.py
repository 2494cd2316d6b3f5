"""Sigma and Jacobians against 80-digit arithmetic, dense decomposition, autograd and modules in use."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from preln import closed_form as cf
from preln.testing import (
    NormLayer,
    assert_jacobian_matches,
    assert_sigma_bound,
    norm_inputs,
    norm_layers,
    tolerance,
)
from preln.testing.cases import cases
from preln.testing.layers import KINDS

from . import oracle


@pytest.mark.parametrize("kind", KINDS)
def test_sigma_matches_80_digits(kind):
    checked = 0
    for layer, x in cases(kind, seed=20, rounds=8, gained=True, dimensions=(1, 2, 3, 4, 5)):
        gain = torch.ones(x.shape[-1], dtype=x.dtype) if layer.weight is None else layer.weight
        sigma = layer.sigma(x)
        for row, value in zip(x[::3], sigma[::3], strict=True):
            expected = oracle.sigma(kind, row.tolist(), gain.tolist(), layer.eps)
            assert value.item() == pytest.approx(expected, rel=1e-13, abs=0), (layer, row)
            checked += 1
    assert checked > 200


@given(norm_inputs(), st.data())
@example(torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64), None)
def test_sigma_lies_between_its_bounds(x, data):
    if data is None:
        layer = NormLayer("layer_norm", 1e-12, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=x.dtype))
    else:
        layer = data.draw(norm_layers(len(x)))
    sigma = layer.sigma(x)
    lower, upper = layer.bounds(x)
    rtol = tolerance(x.dtype)
    assert lower * (1 - rtol) <= sigma <= upper * (1 + rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_first_singular_value_is_sigma(kind):
    for gained in (False, True):
        for layer, x in cases(kind, seed=22, rounds=2, gained=gained):
            values = layer.singular_values(x)
            _, top = layer.bounds(x)
            assert values.shape == x.shape and (values.diff(dim=-1) <= 1e-14 * top[:, None]).all()
            assert ((values[:, 0] - layer.sigma(x)).abs() <= 1e-12 * top).all()


def test_ties_at_both_poles_and_a_dominant_gain():
    """Cases that once went wrong: an exactly degenerate tail, and Newton starting at a pole."""
    f64 = torch.float64
    for x, gain, eps in (
        ([1.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], 0.0),
        ([998.47, 1001.16, 1000.07, 998.61], [0.1, 100.0, -0.48, -0.56], 0.01),
        ([0.0, 0.0, 5.0], [1.0, 1.0, 3.0], 1e-6),
        ([2.0, -1.0, -1.0], [2.0, 1.0, 1.0], 0.25),
        ([3.0, 0.0, 0.0], [2.0, 2.0, -2.0], 0.0),
    ):
        for kind in KINDS:
            value = (
                NormLayer(kind, eps, torch.tensor(gain, dtype=f64)).sigma(torch.tensor(x, dtype=f64)).item()
            )
            expected = oracle.sigma(kind, x, gain, eps)
            assert value == pytest.approx(expected, rel=1e-12), (kind, x, gain)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Qwen3RMSNorm", "MistralRMSNorm"])
def test_modules_of_transformers(name):
    family = name.removesuffix("RMSNorm").lower()
    module_of = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    module = getattr(module_of, name)(24, eps=1e-5)
    module.weight.data = 1 + 0.5 * torch.randn(24)
    x = torch.randn(16, 24) * torch.logspace(-3, 3, 16)[:, None]
    assert_jacobian_matches(module, x, cf.rms_norm_jacobian(x, module.weight, eps=1e-5), rtol=1e-5)
    assert_sigma_bound(module, x, cf.rms_norm_sigma(x, module.weight, eps=1e-5), side="equal", rtol=1e-5)


@pytest.mark.parametrize("module", [torch.nn.RMSNorm(12, eps=1e-6), torch.nn.LayerNorm(12, eps=1e-5)])
def test_modules_of_torch(module):
    torch.manual_seed(0)
    module = module.double()
    module.weight.data = torch.randn(12, dtype=torch.float64)
    x = torch.randn(16, 12, dtype=torch.float64) * torch.logspace(-3, 3, 16, dtype=torch.float64)[:, None]
    kind = "rms_norm" if isinstance(module, torch.nn.RMSNorm) else "layer_norm"
    layer = NormLayer(kind, module.eps, module.weight.detach())
    assert_jacobian_matches(module, x, layer.jacobian, rtol=1e-9)
    assert_sigma_bound(module, x, layer.sigma, side="equal", rtol=1e-9)


def test_the_oracles_notice_a_wrong_formula():
    """Negative controls: eps moved outside, eps forgotten, centring forgotten, gain forgotten."""
    torch.manual_seed(0)
    x, gain = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    layer = NormLayer("rms_norm", 0.1, gain)
    for wrong in (
        cf.rms_norm_jacobian(x, gain, eps=0.1, eps_placement="outside"),
        cf.rms_norm_jacobian(x, gain, eps=0.0),
        cf.layer_norm_jacobian(x, gain, eps=0.1),
        cf.rms_norm_jacobian(x, eps=0.1),
        torch.diag(gain) / layer.denominator(x)[:, None, None],
    ):
        with pytest.raises(AssertionError, match="Jacobian entries differ"):
            assert_jacobian_matches(layer, x, wrong)
