"""The norm layers in use against their closed forms."""

from dataclasses import replace

import pytest
import torch

from preln.testing import NormLayer, assert_jacobian_matches, autograd_jacobian
from preln.testing.hunt import module_error, norm_module_evidence
from preln.testing.modules import LN_MODULES, NORM_MODULES, RMS_MODULES

F64 = torch.float64
GAIN = torch.tensor([0.5, -2.0, 1.25, 0.0, 3.0], dtype=F64)
X = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.25], dtype=F64)

BIASED = ("torch.nn.LayerNorm", "GPT2Block.ln_1", "GPTNeoXLayer.input_layernorm", "NemotronLayerNorm1P")


def test_the_list_of_modules():
    assert set(RMS_MODULES) | set(LN_MODULES) == set(NORM_MODULES) and not set(RMS_MODULES) & set(LN_MODULES)
    assert len(NORM_MODULES) == 16


@pytest.mark.parametrize("name", NORM_MODULES)
def test_output_gain_and_bias(name):
    built = NORM_MODULES[name](GAIN, 1e-3)
    x = X.expand(*built.heads, 5).to(built.dtype)
    y = built.module(x)
    assert y.shape == x.shape and y.dtype == built.dtype and not y.requires_grad
    assert built.layer.kind == ("rms_norm" if name in RMS_MODULES else "layer_norm")
    assert built.layer.eps == (1e-5 if name == "OlmoLayerNorm" else 1e-3)
    if name == "OlmoLayerNorm":
        assert built.layer.weight is None
    else:
        assert built.layer.weight.dtype == F64
        assert torch.allclose(built.layer.weight.reshape(-1, 5)[0], GAIN, atol=1e-6)
    bias = getattr(built.module, "bias", None)
    assert (bias is not None) == (name in BIASED) and (bias is None or bool(bias.all()))
    if not built.heads:
        expected = built.layer(x.double()) + (0 if bias is None else bias)
        assert torch.allclose(y.double(), expected, rtol=built.tolerance, atol=built.tolerance)


@pytest.mark.parametrize("name", NORM_MODULES)
def test_jacobian_and_sigma(name):
    built = NORM_MODULES[name](GAIN, 1e-3)
    x = X.expand(3, *built.heads, 5) * torch.tensor([1.0, 100.0, 1e-3], dtype=F64).reshape(
        3, *(1 for _ in built.heads), 1
    )
    x = x.to(built.dtype).contiguous()
    closed = built.layer.jacobian(x.to(F64))
    assert_jacobian_matches(built.module, x, closed.to(built.dtype), rtol=built.tolerance)
    dense = torch.linalg.svdvals(autograd_jacobian(built.module, x).double())[..., 0]
    assert torch.allclose(built.layer.sigma(x.double()), dense, rtol=built.tolerance, atol=0)


@pytest.mark.parametrize("name", NORM_MODULES)
def test_hunted(name):
    (found,) = norm_module_evidence([name], 40)
    assert found.passed and found.detail["n"] == 40, found


@pytest.mark.parametrize("name", NORM_MODULES)
def test_a_wrong_closed_form_is_noticed(name):
    """Negative controls: eps doubled, the gain's offset of 1 forgotten, the other family's formula."""
    built = NORM_MODULES[name](GAIN, 1.0)
    x = X.to(built.dtype).double()
    assert module_error(built, x) <= built.tolerance
    other = "layer_norm" if built.layer.kind == "rms_norm" else "rms_norm"
    wrong = [replace(built.layer, eps=2.0), replace(built.layer, kind=other)]
    if built.layer.weight is not None:
        wrong.append(replace(built.layer, weight=built.layer.weight - 1))
    for layer in wrong:
        assert module_error(replace(built, layer=layer), x) > 1e-3, layer


def test_float32_backpropagation_loses_the_rank_one_term_of_large_vectors():
    """Why the hunt stops at 1e12: 1/s^3 underflows, though the squares are finite."""
    built = NORM_MODULES["LlamaRMSNorm"](torch.ones(2, dtype=F64), 1e-6)
    assert module_error(built, torch.tensor([3e11, 4e11], dtype=torch.float32).double()) <= 1e-6
    x = torch.tensor([3e15, 4e15], dtype=torch.float32)
    assert x.square().isfinite().all()
    lost = autograd_jacobian(built.module, x)
    s = (x.double().square().mean()).sqrt()
    assert torch.allclose(lost.double(), torch.eye(2, dtype=F64) / s, rtol=1e-5)
    assert isinstance(built.layer, NormLayer) and module_error(built, x.double()) > 0.5
