"""One test base for every architecture: structure, measured placement, surgery that survives a reload."""

import pytest
import torch

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, anatomy, drop_blocks, require_pre_ln, tiny_model, view

PLACEMENT = {
    "gemma2": "sandwich",
    "gemma3": "sandwich",
    "glm4": "sandwich",
    "olmo2": "norm-after-branch",
    "exaone4": "norm-after-branch",
    "opt-post": "post-ln",
    "bert": "post-ln",
    **dict.fromkeys(("phi", "gpt_neox", "gptj", "falcon", "cohere"), "parallel"),
}
IDS = torch.arange(3, 35).view(2, 16)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("architecture", sorted(ARCHITECTURES)),
]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_structure_and_placement(architecture):
    model = tiny_model(architecture)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = anatomy(model)
    assert found.num_blocks == 4
    assert found.placement == PLACEMENT.get(architecture, "pre-ln")
    assert found.head is model.get_output_embeddings()
    parts = found.parts(0)
    assert parts.attention is not None
    assert parts.mlp is not None
    if found.placement in ("pre-ln", "parallel"):
        assert found.final_norm is not None
        assert parts.attention_norm is not None
        assert parts.mlp_norm is not None
        require_pre_ln(found, "norm_sigma")
    else:
        with pytest.raises(InputError, match=found.placement):
            require_pre_ln(found, "norm_sigma")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("drop", [[0], [3], [1, 2], [0, 2], [0, 1, 3]])
def test_drop_equals_the_view_and_survives_a_reload(architecture, drop, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(architecture)
    whole = logits(model)
    blocks = anatomy(model).blocks
    shared = view(model, [b for i, b in enumerate(blocks) if i not in drop])
    small = drop_blocks(model, drop)
    expected = logits(shared)
    assert torch.equal(logits(small), expected)
    assert not torch.allclose(expected, whole)
    assert torch.equal(logits(model), whole)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert again.config.get_text_config().num_hidden_layers == 4 - len(drop)
    if architecture == "bert":
        return  # an encoder run as a decoder: its cached generation is not what this tool is for
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = again.generate(IDS, use_cache=True, **arguments)
    assert torch.equal(cached, again.generate(IDS, use_cache=False, **arguments))


def test_the_new_model_shares_nothing(architecture):
    model = tiny_model(architecture)
    whole = logits(model)
    small = drop_blocks(model, [1])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), whole)
