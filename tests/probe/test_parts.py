"""The pieces of a probe by themselves: norms, angles, sums and intervals, gradient sketches, files."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from preln.base.errors import InputError
from preln.base.stats import bootstrap_interval
from preln.models import anatomy, tiny_model
from preln.probe import probe, probe_tables, recognise, sums, write_probe
from preln.probe.pairs import pair_angles
from preln.probe.sums import Sums, multiplicities


def ids(n=4, t=7):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("architecture", "kind", "stored_as"),
    [
        ("llama", "rms", "gain"),
        ("gemma", "rms", "1+weight"),
        ("gpt2", "layer", "gain"),
        ("cohere", "layer", "gain"),
        ("olmo", "layer", "none"),
        ("nemotron", "layer", "1+weight"),
    ],
)
def test_norms_are_recognised(architecture, kind, stored_as):
    norm = anatomy(tiny_model(architecture)).parts(1).attention_norm
    law = recognise(norm, 64)
    assert (law.kind, law.stored_as, law.eps_placement) == (kind, stored_as, "inside")
    assert law.eps == pytest.approx(
        next((getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-5)
    )
    # the formula's spectral norm is the module's own
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.01
    true = torch.linalg.svdvals(torch.autograd.functional.jacobian(norm, x).double())[0].item()
    assert law.sigma(x[None]).item() == pytest.approx(true, rel=1e-4)
    assert law.bound(x[None]).item() >= true * (1 - 1e-5)


def test_eps_outside_the_root_is_told_apart():
    class Outside(nn.Module):
        eps = 1e-3

        def forward(self, x):
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)

    assert recognise(Outside(), 32).eps_placement == "outside"


def test_a_norm_of_another_kind_is_refused():
    class L1(nn.Module):
        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    with pytest.raises(InputError, match="L1: neither"):
        recognise(L1(), 32)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 0.1, 1.0, math.pi / 2, 3.0, math.pi])
def test_angles_keep_their_digits(angle):
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) * 7
    found = pair_angles(torch.stack([a, b])[:, None])[0]
    assert found[0, 1].item() * math.pi == pytest.approx(angle, abs=1e-7)
    assert found[0, 0].item() == 0.0


def test_negative_control_arccos_of_a_bfloat16_cosine_loses_the_angle():
    angle = 0.05
    states = torch.tensor([[[1.0, 0.0]], [[math.cos(angle), math.sin(angle)]]])
    assert math.acos(float(torch.tensor(math.cos(angle)).bfloat16())) == 0.0
    assert pair_angles(states)[0, 0, 1].item() * math.pi == pytest.approx(angle, rel=1e-6)


def test_intervals_are_those_of_the_bootstrap():
    sums = Sums()
    numerator, count = torch.tensor([3.0, 8.0, 1.0, 9.0]), torch.tensor([3.0, 4.0, 2.0, 3.0])
    sums.add(("m", 0, "block", "mean"), "ratio", numerator[:3], count[:3])
    sums.flush()
    sums.add(("m", 0, "block", "mean"), "ratio", numerator[3:], count[3:])
    sums.flush()
    row = sums.table(draws=500, seed=7).iloc[0]
    low, high = bootstrap_interval(numerator / count, weights=count, draws=500, seed=7)
    assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx((21 / 12, low, high, 4))
    assert sums.sequences()["value"].tolist() == pytest.approx((numerator / count).tolist())
    assert sums.table(draws=0, seed=7)[["low", "high"]].isna().all(axis=None)


@pytest.mark.integration
def test_the_interval_of_the_parameter_gradient_is_that_of_resampled_gradients():
    """The sketch against the true thing: all batches' gradients kept and recombined."""
    model, tokens = tiny_model("llama", blocks=2), ids(6)
    table = probe(model, tokens, measures=["grad_param"], batch_size=1, bootstrap=400, seed=1)
    shares = []
    for row in tokens:
        model.zero_grad()
        (model(input_ids=row[None], labels=row[None]).loss / len(tokens)).backward()
        shares.append([torch.cat([p.grad.flatten() for p in b.parameters()]) for b in model.model.layers])
    model.zero_grad()
    for block in range(2):
        gradients = torch.stack([s[block] for s in shares]).double().numpy()
        counts = multiplicities(6, draws=400, seed=1)
        squares = ((counts.T @ gradients) ** 2).sum(axis=1)
        value = np.linalg.norm(gradients.sum(axis=0))
        # a resampled mean is longer than the mean: the excess is taken off
        assert squares.mean() > value**2
        low, high = np.sqrt(np.quantile(squares - squares.mean() + value**2, [0.025, 0.975]))
        row = table[(table["layer"] == block) & (table["site"] == "block")].iloc[0]
        assert row["value"] == pytest.approx(np.linalg.norm(gradients.sum(axis=0)), rel=1e-4)
        assert (row["low"], row["high"]) == pytest.approx((low, high), rel=0.1)
        assert row["n"] == 6
    few = probe(model, tokens, measures=["grad_param"], batch_size=2)
    assert few["low"].isna().all() and (few["n"] == 3).all()


@pytest.mark.integration
def test_without_parameter_gradients_many_batches_pass():
    table = probe(tiny_model("llama", blocks=2), ids(), measures=["grad_hidden"], batch_size=1)
    assert set(table["measure"]) == {"grad_hidden"}


@pytest.mark.integration
def test_forward_measures_need_no_gradient(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass was made"))
    table = probe(tiny_model("llama", blocks=2), ids(), measures=["cosine", "norm_sigma"])
    assert set(table["measure"]) == {"cosine", "norm_sigma"}


@pytest.mark.integration
def test_one_forward_and_one_backward_pass_for_each_sequence_batch(monkeypatch):
    model, calls = tiny_model("gpt2", blocks=2), []
    anatomy_calls = []
    model.register_forward_hook(lambda *_: anatomy_calls.append(1))
    anatomy(model)
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (calls.append(1), backward(*a, **k)))
    anatomy_calls.clear()
    probe_tables(model, ids(5), batch_size=2)
    # the anatomy was measured before, and is not again
    assert (len(anatomy_calls), len(calls)) == (3, 3)


@pytest.mark.integration
def test_half_precision_is_reduced_in_float32():
    model, tokens = tiny_model("llama", blocks=2), ids()
    exact = probe(model, tokens, measures=["residual_rms", "block_influence", "norm_sigma"])
    half = probe(model.bfloat16(), tokens, measures=["residual_rms", "block_influence", "norm_sigma"])
    assert half.attrs["dtype"] == "bfloat16" and half["value"].dtype == np.float64
    np.testing.assert_allclose(half["value"], exact["value"], rtol=5e-2)


@pytest.mark.integration
def test_the_folder_of_a_probe(tmp_path):
    result = probe_tables(tiny_model("gpt2", blocks=2), ids(), batch_size=2)
    out = write_probe(result, tmp_path / "probe")
    names = ["checksums.json", "layers.parquet", "manifest.json", "pairs.parquet", "sequences.parquet"]
    assert sorted(p.name for p in out.iterdir()) == names
    layers = pd.read_parquet(out / "layers.parquet")
    pd.testing.assert_frame_equal(layers, result.layers, check_dtype=False)
    key = ["measure", "layer", "site", "statistic"]
    assert list(layers.columns) == [*key, "value", "low", "high", "n", "dtype", "attn_implementation"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["placement"] == "pre-ln" and manifest["tokens"]["targets"] == 4 * 6
    again = probe_tables(tiny_model("gpt2", blocks=2), ids(), batch_size=2)
    pd.testing.assert_frame_equal(again.layers, result.layers)
    with pytest.raises(InputError, match="not empty"):
        write_probe(result, out)


def test_samples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    parts = np.random.default_rng(1).normal(size=(2, 3, 7))
    whole = parts @ multiplicities(7, draws=300, seed=5)
    np.testing.assert_allclose(sums.resampled(parts, draws=300, seed=5), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(sums, "AT_ONCE", 1)
    np.testing.assert_allclose(sums.resampled(parts, draws=300, seed=5), whole, rtol=1e-12, atol=1e-12)
    assert not np.allclose(sums.resampled(parts, draws=300, seed=6), whole)
