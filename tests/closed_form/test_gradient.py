"""Gradients of sigma: finite differences, a dense differentiable decomposition, 80 digits, convexity."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from preln import closed_form as cf
from preln.closed_form import gradient
from preln.testing import NormLayer
from preln.testing.layers import KINDS

from . import oracle, reference

F64 = torch.float64


def gradients(kind, eps, x, weight):
    """Sigma's gradients in x and in the gain, one gain a row."""
    x = x.detach().clone().requires_grad_()
    weight = None if weight is None else weight.detach().expand(x.shape).clone().requires_grad_()
    sigma = NormLayer(kind, eps, weight).sigma(x)
    inputs = (x,) if weight is None else (x, weight)
    return torch.autograd.grad(sigma.sum(), inputs)


def dense_sigma(kind, eps, x, weight):
    """Sigma by decomposing the dense Jacobian, in differentiable operations; and its relative gap."""
    d = x.shape[-1]
    centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
    plain = torch.eye(d, dtype=x.dtype) - (1 / d if kind == "layer_norm" else 0)
    square = centred.square().mean(-1)[:, None, None]
    along = centred[:, :, None] * centred[:, None, :] / d
    if kind == "rms_norm_outside":
        s = square.sqrt() + eps
        jacobian = plain / s - along / (square.sqrt() * s**2)
    else:
        s = (square + eps).sqrt()
        jacobian = plain / s - along / s**3
    values = torch.linalg.svdvals(weight[..., :, None] * jacobian)
    gap = (values[:, 0] - values[:, 1]) / values[:, 0] if d > 1 else torch.ones(len(x))
    return values[:, 0], gap.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 24])
def test_against_a_dense_decomposition(kind, d):
    generator = torch.Generator().manual_seed(d)
    x, weight = torch.randn(2, 100, d, dtype=F64, generator=generator)
    for eps in (0.1, 1.0):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        sigma, gap = dense_sigma(kind, eps, a, b)
        for mine, theirs in zip(
            gradients(kind, eps, x, weight), torch.autograd.grad(sigma.sum(), (a, b)), strict=True
        ):
            # Singular vectors, and with them the gradient, are only as good as the gap allows.
            error = gap * (mine - theirs).norm(dim=-1)
            assert (error <= 1e-12 * theirs.norm(dim=-1).clamp(min=1e-12)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3, 6])
@pytest.mark.parametrize("gained", [False, True])
def test_gradcheck(kind, d, gained):
    generator = torch.Generator().manual_seed(40 + d)
    x = torch.randn(3, d, dtype=F64, generator=generator).requires_grad_()
    weight = torch.randn(d, dtype=F64, generator=generator).requires_grad_() if gained else None
    inputs = (x, weight) if gained else (x,)
    assert torch.autograd.gradcheck(lambda x, w=None: NormLayer(kind, 0.3, w).sigma(x), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_against_80_digits_on_adversarial_cases(kind):
    """Zero, constant, parallel, huge, subnormal x; tied, zero, one-hot gains; left and right derivatives."""
    generator = torch.Generator().manual_seed(50)
    smooth = kinks = 0
    for layer, x in reference.cases(kind, seed=51, dimensions=range(1, 5)):
        by_x, by_gain = gradients(kind, layer.eps, x, layer.weight)
        assert by_x.isfinite().all() and by_gain.isfinite().all(), layer
        singular = torch.linalg.svdvals(reference.jacobians(layer, x)[0])
        gap = 1 - singular[:, 1] / singular[:, 0].clamp(min=1e-300) if x.shape[-1] > 1 else torch.ones(len(x))
        for k in range(int(torch.randint(2, (), generator=generator)), len(x), 2):
            along = torch.randn(2, x.shape[-1], dtype=F64, generator=generator)
            for in_x in (True, False):
                dx = along[0] * (x[k].abs().max() or 1.0) * in_x
                dgain = along[1] * (not in_x)
                left, right = oracle.slopes(
                    kind, x[k].tolist(), layer.weight.tolist(), layer.eps, dx.tolist(), dgain.tolist()
                )
                terms = torch.cat([by_x[k] * dx, by_gain[k] * dgain])
                mine, size = float(terms.sum()), float(terms.abs().sum())
                where = (layer, x[k].tolist(), mine, left, right)
                if abs(left - right) <= 1e-9 * max(abs(left), abs(right)):
                    error = abs(mine - (left + right) / 2) * float(gap[k])
                    assert error <= 1e-12 * max(size, abs(left)), where
                    smooth += 1
                else:
                    room = 1e-9 * max(abs(left), abs(right), size)
                    assert min(left, right) - room <= mine <= max(left, right) + room, where
                    kinks += 1
    assert smooth > 500 and kinks > 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_gradient_is_a_subgradient(kind):
    """Identity: sigma is a norm of the gain, so it lies above each of its tangents, at kinks too."""
    generator = torch.Generator().manual_seed(60)
    for layer, x in reference.cases(kind, seed=61, dimensions=range(1, 13)):
        other = layer.weight + torch.randn(x.shape, dtype=F64, generator=generator) * layer.weight.abs().max()
        _, by_gain = gradients(kind, layer.eps, x, layer.weight)
        there = NormLayer(kind, layer.eps, other).sigma(x)
        tangent = layer.sigma(x) + (by_gain * (other - layer.weight)).sum(-1)
        scale = other.abs().amax(-1) / layer.weight.abs().max() * layer.bounds(x)[1]
        assert (tangent <= there + 1e-10 * scale.nan_to_num(1.0)).all(), layer
        # Euler: sigma is homogeneous of degree 1.
        euler = (by_gain * layer.weight).sum(-1)
        assert torch.allclose(euler, layer.sigma(x), rtol=1e-12, atol=0), layer


def test_shared_gains_dtypes_and_chunks(monkeypatch):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(70)).to(torch.float32)
    for shape in ((5,), (3, 5), (2, 1, 5), (2, 3, 5)):
        a, b = x.clone().requires_grad_(), torch.linspace(1, 2, 5).expand(2, 3, 5)
        b = b.sum_to_size(shape).clone().requires_grad_()
        cf.layer_norm_sigma(a, b).sum().backward()
        assert a.grad is not None and a.grad.dtype == torch.float32 and a.grad.shape == x.shape
        assert b.grad is not None and b.grad.shape == shape
        whole = torch.autograd.grad(cf.layer_norm_sigma(a, b).sum(), (a, b))
        with monkeypatch.context() as patch:
            patch.setattr("preln.closed_form.vectors.ROW_BUDGET", 10)
            pieces = torch.autograd.grad(cf.layer_norm_sigma(a, b).sum(), (a, b))
        assert all(torch.allclose(p, q) for p, q in zip(whole, pieces, strict=True))
    empty = torch.ones(0, 4, requires_grad=True)
    assert torch.autograd.grad(cf.rms_norm_sigma(empty, torch.ones(4)).sum(), empty)[0].shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150, 1e300])
def test_huge_and_tiny_vectors_do_not_overflow(scale):
    x = torch.tensor([[3.0, 4.0, -1.0], [0.0, 2.0, 0.0], [1.0, 1.0, 1.0]], dtype=F64) * scale
    for kind in KINDS:
        for weight in (None, torch.tensor([1.0, -2.0, 0.5], dtype=F64)):
            assert all(g.isfinite().all() for g in gradients(kind, 1e-6, x, weight))


def test_no_cost_and_no_graph_where_no_gradient_is_asked_for(monkeypatch):
    x, weight = torch.randn(4, 6, dtype=F64), torch.ones(6, dtype=F64, requires_grad=True)
    monkeypatch.setattr(gradient, "_Sigma", None)
    assert not cf.rms_norm_sigma(x, weight.detach()).requires_grad
    with torch.no_grad():
        assert not cf.rms_norm_sigma(x, weight).requires_grad
    with pytest.raises(AttributeError):
        cf.rms_norm_sigma(x, weight)


@pytest.mark.parametrize("sigma", [cf.rms_norm_sigma, cf.layer_norm_sigma])
def test_a_second_derivative_is_refused(sigma):
    x = torch.randn(4, 6, dtype=F64, requires_grad=True)
    weight = torch.ones(6, dtype=F64, requires_grad=True)
    # In the first case nothing upstream depends on x; beside a term with a second derivative it must not
    # vanish.
    for loss in (lambda v: v, lambda v: v + x.square().sum(-1), torch.exp):
        value = loss(sigma(x, weight)).sum()
        for first in torch.autograd.grad(value, (x, weight), create_graph=True):
            for again in (x, weight):
                with pytest.raises(RuntimeError, match="first derivative only"):
                    torch.autograd.grad(first.sum(), again, retain_graph=True)


def test_only_vectors_are_kept_for_the_backward_pass():
    d = 20_000
    x, weight = torch.randn(2, d, requires_grad=True), torch.randn(d, requires_grad=True)
    for sigma in (cf.rms_norm_sigma, cf.layer_norm_sigma):
        kept: list[int] = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = sigma(x, weight)
        value.sum().backward()
        # x and the gain themselves, and one gradient for each.
        assert sum(kept) == 3 * x.numel() + weight.numel()


@pytest.mark.parametrize("term", ["rho", "along"])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_gradcheck_notices_a_missing_term(kind, term, monkeypatch):
    """Negative control: without the part through u, or without the part through s, the gradient is wrong."""
    right = gradient.of_root

    def wrong(rows, root, *, outside=False):
        if term == "rho":
            return right(rows, replace(root, pull=0 * root.pull), outside=outside)
        exact = right(rows, root, outside=outside)
        return replace(exact, by_x=exact.by_x - (exact.by_x * rows.unit).sum(-1, keepdim=True) * rows.unit)

    for module in ("rms_norm", "layer_norm"):
        monkeypatch.setattr(f"preln.closed_form.{module}.of_root", wrong)
    x = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(80)).requires_grad_()
    weight = torch.linspace(1, 2, 6, dtype=F64)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: NormLayer(kind, 0.3, weight).sigma(x), (x,))
