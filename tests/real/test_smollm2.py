"""The real model: loads, measures, is cut, and behaves as its architecture says."""

import numpy as np
import pytest
import torch

from preln import load_tokens
from preln.cli import main
from preln.models import anatomy, drop_blocks, is_tied, token_losses
from preln.probe import probe

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def batch(smollm2):
    return load_tokens("docstrings", smollm2[1], sequences=2, length=48, seed=5)


def test_it_is_the_trained_model_with_its_own_tokenizer(smollm2, batch):
    model, tokenizer = smollm2
    found = anatomy(model)
    assert (found.num_blocks, found.placement) == (30, "pre-ln")
    assert model.config.hidden_size == 576
    assert is_tied(model)
    losses, mask = token_losses(model, batch)
    assert losses[mask].mean() < 5.0 < np.log(len(tokenizer))
    shuffled = batch[:, torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    assert token_losses(model, shuffled)[0].mean() > losses.mean() + 1.0


def test_norm_sigma_equals_the_dense_singular_value_of_the_real_norm(smollm2, batch):
    model, _ = smollm2
    norm = anatomy(model).parts(3).mlp_norm
    seen = []
    handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(batch[:1, :4], use_cache=False)
    handle.remove()
    dense = [
        torch.linalg.svdvals(torch.autograd.functional.jacobian(norm, x).double())[0].item()
        for x in seen[-1][0]
    ]
    table = probe(model, batch[:1, :4], measures=["norm_sigma"], bootstrap=0)
    row = table[(table["layer"] == 3) & (table["site"] == "mlp") & (table["statistic"] == "mean")]
    assert row["value"].item() == pytest.approx(np.mean(dense), rel=1e-5)


def test_the_stream_grows_and_the_gradient_falls(smollm2, batch):
    table = probe(smollm2[0], batch, measures=["residual_rms", "grad_hidden"], bootstrap=0)
    table = table[table["statistic"] == "mean"].sort_values("layer")
    stream = table[table["measure"] == "residual_rms"]["value"].to_numpy()
    gradient = table[table["measure"] == "grad_hidden"]["value"].to_numpy()
    assert stream[0] < 0.5 < 10 < stream[-1]
    assert gradient[0] > 10 * gradient[15] > 10 * gradient[29]


def test_a_pruned_checkpoint_is_plain_and_equal(smollm2, batch, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "small"
    assert main(["prune", "smollm2-135m", "--metric", "reverse", "--drop", "8", "--out", str(out)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert plain.config.num_hidden_layers == 22
    with torch.no_grad():
        expected = drop_blocks(smollm2[0], range(22, 30))(batch, use_cache=False).logits
        assert torch.equal(plain(batch, use_cache=False).logits, expected)
        settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(batch[:1, :8])}
        cached = plain.generate(batch[:1, :8], use_cache=True, **settings)
        assert torch.equal(cached, plain.generate(batch[:1, :8], use_cache=False, **settings))
