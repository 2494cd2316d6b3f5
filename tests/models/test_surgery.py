import pytest
import torch
from torch import nn

from preln.base.errors import InputError
from preln.models import anatomy, drop_blocks, is_tied, tiny_model, untie_head, view

IDS = torch.arange(3, 35).view(2, 16)
pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ([4], "block 4 is out of range: this model has blocks 0 to 3"),
        ([-1], "block -1 is out of range"),
        ([1, 1], "block 1 is named twice"),
        ([0, 1, 2, 3], "all 4 blocks"),
        ([], "no block to remove"),
        ([True], "whole numbers"),
    ],
)
def test_senseless_removals_are_refused(drop, message):
    with pytest.raises(InputError, match=message):
        drop_blocks(tiny_model("llama"), drop)


def test_indices_inside_blocks_are_renumbered():
    small = drop_blocks(tiny_model("llama"), [0, 2])
    assert [block.self_attn.layer_idx for block in anatomy(small).blocks] == [0, 1]


def test_per_layer_lists_follow_their_blocks():
    model = tiny_model("gemma2")
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2  # else this test could not fail
    assert drop_blocks(model, [0]).config.layer_types == kinds[1:]


def test_a_view_may_run_a_foreign_module():
    class Stored(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.hidden = hidden

        def forward(self, *args, **kwargs):
            return self.hidden

    model = tiny_model("llama")
    blocks = anatomy(model).blocks
    seen = {}
    handle = blocks[2].register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0]))
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        handle.remove()
        resumed = view(model, [Stored(seen["x"]), *blocks[2:]])(IDS, use_cache=False).logits
    assert torch.equal(resumed, expected)


def test_hooks_on_a_view_do_not_reach_the_model():
    model = tiny_model("llama")
    shared = view(model, anatomy(model).blocks[:2])
    shared.model.register_forward_hook(lambda *_: None)
    shared.register_forward_hook(lambda *_: None)
    assert not model.model._forward_hooks
    assert not model._forward_hooks


def test_untying_keeps_the_function_and_the_weight(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("gemma")
    assert is_tied(model)
    with torch.no_grad():
        before = model(IDS).logits
        untie_head(model)
        assert not is_tied(model)
        model.get_output_embeddings().weight[7] += 1.0
        model.get_output_embeddings().weight[7] -= 1.0
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)
        model.get_output_embeddings().weight.mul_(2.0)
        doubled = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, doubled)


def test_a_tied_head_stays_tied_after_a_cut(tmp_path):
    small = drop_blocks(tiny_model("gemma"), [1])
    assert is_tied(small)


@pytest.mark.parametrize("drop", [[0], [0, 1], [1, 3], [3]])
@pytest.mark.parametrize("kind", ["deepseek_v3", "bart"])
def test_counts_of_first_blocks_and_second_depths_are_cut_too(kind, drop, tmp_path):
    """DeepSeek counts its leading dense blocks; BART's decoder has a depth of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    settings = {
        "deepseek_v3": {
            "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
            "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        "bart": {
            "d_model": 32, "decoder_layers": 4, "encoder_layers": 2, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 48, "is_decoder": True,
        },
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **common, **settings[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    small = drop_blocks(model, drop)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = small(input_ids=IDS % 64, use_cache=False).logits
        found = loaded(input_ids=IDS % 64, use_cache=False).logits
    assert torch.equal(found, expected)
