"""The decoder of placement studies: its formulas written out slowly, and what its placements share."""

import math

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.models import anatomy, drop_blocks
from preln.models.scratch import PLACEMENTS, ScratchForCausalLM, scratch_model

pytestmark = pytest.mark.integration
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def made(placement, seed=0, **other):
    """A float64 model whose gains are not one, so that a formula which forgets a gain is wrong."""
    model = scratch_model(placement, seed=seed, **(SIZES | other)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def norm(x, gain):
    centred = x - sum(x) / len(x)
    return gain * centred / math.sqrt(sum(centred**2) / len(x) + 1e-5)


def attend(stream, w, layer, heads):
    """Causal attention token by token and head by head, positions as turns of complex numbers."""
    d = stream.shape[1] // heads
    turns = np.exp(1j * np.outer(np.arange(len(stream)), 10000.0 ** (-np.arange(0, d, 2) / d)))
    q, k, v = (stream @ w[f"{layer}.self_attn.{name}_proj.weight"].T for name in "qkv")
    out = np.zeros_like(stream)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for p in range(len(stream)):
            scores = []
            for s in range(p + 1):
                ends = []
                for vector, place in ((q[p, part], p), (k[s, part], s)):
                    ends.append((vector[0::2] + 1j * vector[1::2]) * turns[place])
                scores.append(float((ends[0] * ends[1].conj()).sum().real) / math.sqrt(d))
            weights = np.exp(np.array(scores) - max(scores))
            for s, weight in enumerate(weights / weights.sum()):
                out[p, part] += weight * v[s, part]
    return out @ w[f"{layer}.self_attn.o_proj.weight"].T


def feed(stream, w, layer):
    inner = stream @ w[f"{layer}.mlp.up_proj.weight"].T
    gelu = np.vectorize(lambda u: 0.5 * u * (1.0 + math.erf(u / math.sqrt(2.0))))(inner)
    return gelu @ w[f"{layer}.mlp.down_proj.weight"].T


def literal(model, ids):
    """Logits ``[t, v]`` of one sequence, in plain loops."""
    w = {name: value.numpy() for name, value in model.state_dict().items()}
    placement, heads = model.config.placement, model.config.num_attention_heads
    x = np.stack([w["model.embed_tokens.weight"][i] for i in ids])
    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}"

        def normed(stream, name, layer=layer):
            return np.stack([norm(row, w[f"{layer}.{name}.weight"]) for row in stream])

        factor = 1.0 / math.sqrt(number + 1) if placement == "scaled" else 1.0
        if placement == "post":
            m = normed(x + attend(x, w, layer, heads), "attention_norm")
            x = normed(m + feed(m, w, layer), "mlp_norm")
            continue
        branch = attend(factor * normed(x, "attention_norm"), w, layer, heads)
        m = x + (normed(branch, "attention_norm_after") if placement == "sandwich" else branch)
        branch = feed(factor * normed(m, "mlp_norm"), w, layer)
        x = m + (normed(branch, "mlp_norm_after") if placement == "sandwich" else branch)
    final = np.stack([norm(row, w["model.norm.weight"]) for row in x])
    return final @ w["lm_head.weight"].T


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_decoder_is_its_formula(placement):
    model, ids = made(placement), torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        fast = model(input_ids=ids).logits[0].numpy()
    slow = literal(model, ids[0].tolist())
    assert np.abs(fast - slow).max() < 1e-10 * np.abs(slow).max()
    for other in {"pre", "post", "scaled"} - {placement}:  # the oracle tells them apart
        model.config.placement = other
        assert np.abs(fast - literal(model, ids[0].tolist())).max() > 1e-2


def test_pre_ln_is_scaled_with_factors_of_one():
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    one = {"num_hidden_layers": 1}
    assert torch.equal(made("pre", **one)(input_ids=ids).logits, made("scaled", **one)(input_ids=ids).logits)
    unit = made("scaled", norm_factors=[1.0, 1.0, 1.0])
    assert torch.equal(made("pre")(input_ids=ids).logits, unit(input_ids=ids).logits)
    assert not torch.allclose(made("pre")(input_ids=ids).logits, made("scaled")(input_ids=ids).logits)


def test_placements_give_other_outputs_and_gradients():
    ids, found = torch.tensor([[3, 1, 4, 1, 5]]), {}
    for placement in PLACEMENTS:
        model = made(placement)
        logits = model(input_ids=ids).logits
        torch.logsumexp(logits, -1).sum().backward()
        found[placement] = (logits.detach(), model.model.embed_tokens.weight.grad)
    for a in PLACEMENTS:
        for b in PLACEMENTS:
            for left, right in zip(found[a], found[b], strict=True):
                assert (float((left - right).norm() / right.norm()) > 0.05) == (a != b)


def test_shared_parameters_start_from_the_same_values():
    states = {placement: scratch_model(placement, seed=3, **SIZES).state_dict() for placement in PLACEMENTS}
    for state in states.values():
        assert all(torch.equal(value, state[name]) for name, value in states["pre"].items())
    more = states["sandwich"].keys() - states["pre"].keys()
    assert len(more) == 2 * SIZES["num_hidden_layers"]
    assert all(bool((states["sandwich"][name] == 1).all()) for name in more)
    assert states["post"].keys() == states["scaled"].keys() == states["pre"].keys()
    other = scratch_model("pre", seed=4, **SIZES).state_dict()
    assert not any(torch.equal(v, other[n]) for n, v in states["pre"].items() if v.ndim > 1)


def test_matrices_start_with_unit_gain():
    state = scratch_model("pre", hidden_size=64, intermediate_size=256).state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            expected = 1.0 if "embed" in name else value.shape[1] ** -0.5
            assert float(value.std()) == pytest.approx(expected, rel=0.05)


def test_only_what_ends_a_branch_takes_the_branch_gain():
    whole, less = (scratch_model("post", branch_gain=g, **SIZES).state_dict() for g in (1.0, 0.25))
    ends = {name for name in whole if "o_proj" in name or "down_proj" in name}
    assert len(ends) == 2 * SIZES["num_hidden_layers"]
    assert all(torch.equal(less[n], (0.25 if n in ends else 1.0) * value) for n, value in whole.items())


def test_a_causal_model_and_padding_in_front_shifts_nothing():
    model, ids = made("post"), torch.tensor([[3, 1, 4, 1, 5]])
    whole = model(input_ids=ids).logits
    assert torch.allclose(whole[:, :3], model(input_ids=ids[:, :3]).logits, atol=1e-12)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert torch.allclose(whole, model(input_ids=padded, attention_mask=mask).logits[:, 2:], atol=1e-12)
    assert not torch.allclose(whole, model(input_ids=padded).logits[:, 2:], atol=1e-3)


@pytest.mark.parametrize(
    ("placement", "measured"),
    [("pre", "pre-ln"), ("post", "post-ln"), ("sandwich", "sandwich"), ("scaled", "pre-ln")],
)
def test_the_placement_is_measured_as_what_it_is(placement, measured):
    found = anatomy(scratch_model(placement, **SIZES))
    assert (found.placement, found.num_blocks) == (measured, 3)
    assert found.final_norm is not None


def test_a_cut_model_keeps_its_factors_and_can_be_made_again():
    model, ids = made("scaled"), torch.tensor([[3, 1, 4]])
    small = drop_blocks(model, [0])
    assert [block.factor for block in small.model.layers] == pytest.approx([2**-0.5, 3**-0.5])
    again = ScratchForCausalLM(small.config).double().eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="placement 'mid': unknown: use one of pre, post"):
        scratch_model("mid")
    with pytest.raises(InputError, match="hidden_size 10: not a multiple of twice 4 heads"):
        scratch_model("pre", hidden_size=10)
