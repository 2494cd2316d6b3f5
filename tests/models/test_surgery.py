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
