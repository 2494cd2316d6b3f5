"""Halves of blocks on every architecture: zeroed in place, or taken out; proved against hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, anatomy, drop_blocks, find_blocks, load_model, tiny_model
from preln.models import compact as compact_module
from preln.models.compact import StandIn, describe_stand_ins, is_compact, load_compact
from preln.models.halves import contributes_nothing, silence_halves
from preln.models.trial import returning
from preln.prune import plan_layers, prune, write_checkpoint
from preln.prune.surgery import check_checkpoint

pytestmark = pytest.mark.integration
IDS = torch.randint(1, 512, (2, 9), generator=torch.Generator().manual_seed(0))
# where the module of a branch adds the stream, or norms it, by itself: the linear map in front of that
LEAVES = {
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
}
HALVES = [(0, "attention"), (1, "mlp"), (3, "attention"), (3, "mlp")]
NAMES = ["0a", "1m", "3a", "3m"]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def branch(model, architecture, index, kind):
    """What returns zeros once the half is gone, found without the code under test."""
    found = anatomy(model)
    if architecture in LEAVES:
        return found.blocks[index].get_submodule(LEAVES[architecture][kind == "mlp"])
    parts = found.parts(index)
    return parts.attention if kind == "attention" else parts.mlp


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_zeroed_and_taken_out_equal_the_model_whose_branches_return_zeros(architecture, tmp_path):
    model = tiny_model(architecture)
    whole = logits(model)
    with returning([branch(model, architecture, *half) for half in HALVES]):
        expected = logits(model)
    assert not torch.allclose(expected, whole, atol=1e-3)
    plain = prune(model, NAMES)
    assert torch.equal(logits(model), whole)  # the model given is untouched
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    if architecture == "bert":
        with pytest.raises(InputError, match="a norm that stays"):
            prune(model, NAMES, compact=True)
        return
    small = prune(model, NAMES, compact=True)
    torch.testing.assert_close(logits(small), logits(plain), rtol=0, atol=1e-6)
    # stored and computed less: counted, not timed
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in plain.parameters())
    operations = []
    for each in (small, plain):
        with FlopCounterMode(display=False) as counter:
            logits(each)
        operations.append(counter.get_total_flops())
    assert operations[0] < 0.85 * operations[1]
    small.save_pretrained(tmp_path)
    check_checkpoint(tmp_path, small)  # reload, logits, generation with and without the cache
    with pytest.raises(ValueError, match="preln_halves"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_only_the_last_map_is_touched_and_it_is_exactly_zero():
    model = tiny_model("gpt2")
    plain = prune(model, ["2a", "1m"])
    changed = [k for k, v in plain.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert changed == [
        f"transformer.h.{place}.c_proj.{kind}" for place in ("1.mlp", "2.attn") for kind in ("weight", "bias")
    ]
    assert all(not plain.state_dict()[k].any() for k in changed)


@pytest.mark.parametrize(
    ("architecture", "zero"),
    [
        ("gpt2", ["attn.c_proj.weight"]),  # its bias still acts
        ("llama", ["self_attn.q_proj.weight"]),  # attends evenly, and still acts
        ("bloom", ["self_attention.dense.weight"]),
    ],
)
def test_a_branch_that_still_acts_is_seen(architecture, zero):
    model = tiny_model(architecture)
    half = silence_halves(model, [(1, "attention")])[0]
    assert contributes_nothing(half.trial, half.parts, half.placement, "attention")
    other = tiny_model(architecture).state_dict()
    model.load_state_dict(other)
    with torch.no_grad():
        for name in zero:
            half.trial.block.get_parameter(name).zero_()
        assert not contributes_nothing(half.trial, half.parts, half.placement, "attention")


def test_the_bias_of_a_norm_behind_the_branch_goes_with_it():
    model = tiny_model("gemma2")
    generator = torch.Generator().manual_seed(1)
    for block in model.model.layers:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = nn.LayerNorm(64)
            nn.init.normal_(norm.bias, generator=generator)
            setattr(block, name, norm)
    first = model.model.layers[1]
    with returning([first.post_attention_layernorm]):
        expected = logits(model)
    with returning([first.self_attn]):
        wrong = logits(model)  # the norm of zeros is its bias
    assert not torch.allclose(expected, wrong, atol=1e-3)
    for compact in (False, True):
        torch.testing.assert_close(logits(prune(model, ["1a"], compact=compact)), expected, rtol=0, atol=1e-6)


def test_blocks_and_halves_go_together_by_their_first_indices():
    model = tiny_model("llama", blocks=5)
    blocks = find_blocks(model)[1]
    with returning([blocks[3].self_attn, blocks[4].mlp]):
        expected = logits(drop_blocks_by_hand(model, 1))
    for compact in (False, True):
        small = prune(model, [1, "4m", "3a"], compact=compact)
        torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-6)


def drop_blocks_by_hand(model, index):
    """The same blocks, hooks and all, without one."""
    from preln.models import view

    return view(model, [b for i, b in enumerate(find_blocks(model)[1]) if i != index])


def test_a_compact_checkpoint_is_closed_to_plain_transformers(tmp_path):
    model, tokenizer = load_model("tiny:llama")
    plan = plan_layers(["0a", "2m"], 4, model="tiny:llama")
    small = prune(model, plan=plan, compact=True)
    out = write_checkpoint(small, tokenizer, plan, tmp_path / "out")
    for loader in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises((ValueError, OSError)):
            loader.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert "compact" in card and "preln.load_model" in card and "random weights" in card
    again, _ = load_model(str(out))
    assert is_compact(again) and torch.equal(logits(again), logits(small))
    assert again.config.preln_halves["blocks"].keys() == {"0", "2"}
    # and it can be cut, saved and loaded once more
    less = drop_blocks(again, [1])
    assert [m.layer_idx for m in less.modules() if isinstance(m, StandIn) and m.gives == "zeros"] == [0, None]
    write_checkpoint(less, tokenizer, plan_layers([1], 4), tmp_path / "less")
    assert torch.equal(logits(load_model(str(tmp_path / "less"))[0]), logits(less))


def test_a_checkpoint_that_plain_transformers_would_fill_with_random_weights_is_caught(tmp_path, monkeypatch):
    """Negative control: without the two locks it loads, and gives something else each time."""
    small = prune(tiny_model("llama"), ["0a"], compact=True)
    base = type(small).__mro__[2]
    monkeypatch.setattr(type(small), "save_pretrained", base.save_pretrained)
    small.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="random weights"):
        check_checkpoint(tmp_path, small)


@torch.no_grad()
def step_by_step(model):
    """The last token's logits when the tokens before it come from the cache, counted there alone."""
    past = model(IDS[:, :-1], use_cache=True).past_key_values
    return model(IDS[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gptj"])
def test_stand_ins_count_tokens_in_the_cache(architecture, monkeypatch):
    small = prune(tiny_model(architecture), ["0a", "2a"], compact=True)
    expected = logits(small)[:, -1]
    torch.testing.assert_close(step_by_step(small), expected, rtol=0, atol=1e-5)
    # negative control: with an empty layer in front, the last token takes itself for the first
    monkeypatch.setattr(compact_module, "_count_tokens", lambda *_: None)
    assert not torch.allclose(step_by_step(small), expected, atol=1e-2)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_neox", "mixtral", "opt"])
def test_every_attention_but_one_may_go(architecture, tmp_path):
    """Sliding and full layers keep their places in the cache, whichever attention is left."""
    model = tiny_model(architecture)
    small = prune(model, ["0a", "1a", "2a"], compact=True)
    small.save_pretrained(tmp_path)
    check_checkpoint(tmp_path, small)
    assert torch.equal(logits(load_compact(tmp_path).eval()), logits(small))


def test_what_cannot_be_removed_by_halves_is_refused():
    model = tiny_model("llama")
    blocks = find_blocks(model)[1]
    shared = copy.deepcopy(model)
    shared_blocks = find_blocks(shared)[1]
    shared_blocks[1].mlp.down_proj.weight = shared_blocks[2].mlp.down_proj.weight
    with pytest.raises(InputError, match="shares"):
        prune(shared, ["1m"])
    with pytest.raises(InputError, match="for halves"):
        prune(model, [1], compact=True)
    blocks[1].mlp.register_forward_hook(lambda _, args, out: out + 0.1)  # nothing silences it
    with pytest.raises(InputError, match="block 1"):
        prune(model, ["1m"])


def test_a_compact_model_can_lose_more_halves(tmp_path):
    model = tiny_model("llama")
    once = prune(prune(model, ["0a"], compact=True), ["3m"], compact=True)
    torch.testing.assert_close(logits(once), logits(prune(model, ["0a", "3m"])), rtol=0, atol=1e-6)
    once.save_pretrained(tmp_path)
    check_checkpoint(tmp_path, once)


def test_stand_ins_describe_themselves():
    small = prune(tiny_model("bloom"), ["1m"], compact=True)
    found = describe_stand_ins(small)["blocks"]["1"]
    assert found["mlp"] == {"gives": "1", "returns": 0, "layer_idx": None}  # hands the stream on
    assert found["post_attention_layernorm"]["gives"] == "0"
