"""Shapes, dtypes, devices, memory and refusals of the closed forms."""

import inspect

import pytest
import torch

from preln import closed_form as cf
from preln.base.errors import InputError
from preln.closed_form import secular, vectors

SIGMAS = [cf.rms_norm_sigma, cf.layer_norm_sigma]
ALL = [getattr(cf, name) for name in cf.__all__]


def test_names_and_defaults_of_the_contract():
    assert len(cf.__all__) == 8
    for name in cf.__all__:
        parameters = inspect.signature(getattr(cf, name)).parameters
        assert parameters["eps"].default == (1e-6 if name.startswith("rms") else 1e-5)
        assert ("eps_placement" in parameters) == name.startswith("rms")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_shapes_and_dtypes(dtype, shape):
    torch.manual_seed(0)
    x, gain = torch.randn(shape).to(dtype), torch.randn(5).to(dtype)
    for prefix in ("rms_norm_", "layer_norm_"):
        jacobian, values, sigma, bounds = (
            getattr(cf, prefix + name)(x, gain)
            for name in ("jacobian", "singular_values", "sigma", "sigma_bounds")
        )
        assert jacobian.shape == (*shape, 5) and values.shape == shape
        assert sigma.shape == bounds[0].shape == bounds[1].shape == shape[:-1]
        assert {t.dtype for t in (jacobian, values, sigma, *bounds)} == {dtype}


@pytest.mark.parametrize("sigma", SIGMAS)
def test_one_gain_a_row_is_the_same_as_rows_one_by_one(sigma):
    torch.manual_seed(1)
    x, gain = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    together = sigma(x, gain)
    for a in range(2):
        for b in range(3):
            assert together[a, b].item() == pytest.approx(sigma(x[a, b], gain[a, b]).item(), rel=1e-14)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_chunks_change_nothing(sigma, monkeypatch):
    torch.manual_seed(2)
    x, gain = torch.randn(50, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    whole = sigma(x, gain)
    monkeypatch.setattr(vectors, "ROW_BUDGET", 30)
    assert torch.allclose(whole, sigma(x, gain), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_scaling_permuting_and_signs_of_the_gain(sigma):
    """Identities: scaling the gain scales sigma, its signs do not count, coordinates may be permuted."""
    torch.manual_seed(3)
    x, gain = torch.randn(20, 11, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    value, order = sigma(x, gain), torch.randperm(11)
    assert torch.allclose(sigma(x, -3 * gain), 3 * value, rtol=1e-13, atol=0)
    assert torch.allclose(sigma(x, gain.abs()), value, rtol=1e-13, atol=0)
    assert torch.allclose(sigma(x[:, order], gain[order]), value, rtol=1e-13, atol=0)
    assert not torch.allclose(sigma(x, gain[order]), value, rtol=1e-3, atol=0)


def test_huge_and_tiny_vectors_keep_their_digits():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert cf.rms_norm_sigma(x * 1e150, eps=1e-6).item() == pytest.approx(1e-150 / 12.5**0.5, rel=1e-14)
    assert cf.rms_norm_sigma(x * 1e-300, eps=0.0).item() == pytest.approx(1e300 / 12.5**0.5, rel=1e-14)
    assert cf.rms_norm_sigma(torch.tensor([3e30, 4e30])).item() == pytest.approx(1e-30 / 12.5**0.5, rel=1e-6)
    constant = torch.full((5,), 1e30, dtype=torch.float64)
    assert cf.layer_norm_sigma(constant, eps=1e-4).item() == pytest.approx(100.0, rel=1e-14)


def test_where_there_is_no_jacobian_the_answer_is_nan():
    zero = torch.zeros(3, dtype=torch.float64)
    assert cf.rms_norm_jacobian(zero, eps=0.0).isnan().all()
    assert cf.rms_norm_sigma(torch.tensor([1.0, float("nan"), 2.0]), torch.ones(3)).isnan()


def test_no_square_matrix_is_formed(monkeypatch):
    """The largest tensor that the secular solver makes is as large as its input."""
    largest = 0
    reciprocal = torch.Tensor.reciprocal

    def watched(tensor, *rest):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return reciprocal(tensor, *rest)

    monkeypatch.setattr(torch.Tensor, "reciprocal", watched)
    x, gain = torch.randn(1, 20_000), torch.randn(20_000)
    for sigma in SIGMAS:
        assert sigma(x, gain).isfinite().all()
    assert 0 < largest <= x.numel()


def test_newton_rises_to_the_root_and_never_passes_it():
    seen = []

    def step(rows, mu):
        # F(lambda) = 2 - lambda - lambda/(lambda + 0.01), convex and falling; lambda = 1 + mu.
        lam = 1 + mu
        seen.append(float(lam))
        return 2 - lam - lam / (lam + 0.01), 1 + 0.01 / (lam + 0.01) ** 2

    one = torch.ones(1, dtype=torch.float64)
    root = 1 + float(secular.newton(step, one, 2 * one))
    assert 2 - root - root / (root + 0.01) == pytest.approx(0, abs=1e-15)
    assert seen == sorted(seen) and seen[-1] <= root * (1 + 1e-15) and len(seen) < 8


@pytest.mark.parametrize("sharp", [False, True])
def test_newton_near_a_pole(sharp):
    """F = 1 - mu - mu/(mu + 1e-30) has its root at mu = 1e-15: below a rounding of lambda = 1 + mu."""

    def step(rows, mu):
        return 1 - mu - mu / (mu + 1e-30), 1 + 1e-30 / (mu + 1e-30) ** 2

    one = torch.ones(1, dtype=torch.float64)
    mu = float(secular.newton(step, one, 2 * one, sharp=sharp))
    assert mu < 2e-15
    if sharp:
        assert mu == pytest.approx(1e-15, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"eps": -1.0}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"weight": torch.ones(4)}, "weight"),
        ({"x": torch.ones(3, dtype=torch.int64)}, "int64"),
        ({"x": torch.ones(2, 0)}, "x has shape"),
    ],
)
def test_bad_arguments_are_named(arguments, culprit):
    with pytest.raises(InputError, match=culprit):
        vectors.prepare(**({"x": torch.ones(2, 3), "weight": None, "eps": 1e-6, "centre": False} | arguments))
    with pytest.raises(InputError, match="eps_placement"):
        cf.rms_norm_sigma(torch.ones(3), eps_placement="beside")
