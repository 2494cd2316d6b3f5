"""Blocks with one strange thing each: the verdict is right, or the model is refused, or it is unknown."""

import pytest
import torch

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, anatomy, require_pre_ln, tiny_model

from . import strange

pytestmark = pytest.mark.integration
ZEROED = [("self_attn.o_proj",), ("mlp.down_proj",), ("self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("kind", "settings", "placement"),
    [
        (strange.Block, {}, "pre-ln"),
        (strange.LayerScale, {"value": 0.3}, "pre-ln"),
        (strange.LayerScale, {"value": -2.0, "width": 1}, "pre-ln"),
        (strange.Dropping, {}, "pre-ln"),
        (strange.LateBias, {}, "pre-ln"),
        (strange.RootWidth, {}, "pre-ln"),
        (strange.SharedExpert, {}, "pre-ln"),
        (strange.PostRMS, {}, "post-ln"),
        (strange.Sandwich, {}, "sandwich"),
        (strange.ParallelZero, {}, "parallel"),
    ],
)
def test_what_a_placement_allows_is_seen_through(kind, settings, placement):
    found = anatomy(strange.plain(kind, **settings))
    assert found.placement == placement
    assert found.placements == [placement] * 3
    block, parts = found.blocks[1], found.parts(1)
    assert parts.attention is block.self_attn
    assert parts.mlp is block.mlp
    assert found.final_norm is not None


@pytest.mark.parametrize(
    "kind",
    [
        strange.FakeNorm,
        strange.HalfFake,
        strange.NormsSomethingElse,
        strange.MLPNormsTheInputAndMore,
        strange.IgnoresAttention,
        strange.ReadsTheStreamToo,
        strange.ScaledStream,
        strange.NormedStream,
        strange.HalfSandwich,
        strange.AlwaysRandom,
        strange.ThirdBranch,
    ],
)
def test_what_no_placement_allows_is_unknown(kind):
    found = anatomy(strange.plain(kind))
    assert found.placement == "unknown"
    assert found.evidence["placements"] == ["unknown"] * 3
    with pytest.raises(InputError, match="measures as unknown"):
        require_pre_ln(found, "norm_sigma")


@pytest.mark.parametrize("zeroed", ZEROED)
def test_a_branch_that_starts_at_zero_hides_no_placement(zeroed):
    torch.manual_seed(0)
    serial = strange.model_of(*[strange.ZeroInitialised(*zeroed) for _ in range(3)])
    parallel = strange.model_of(*[strange.ParallelZero(*zeroed) for _ in range(3)])
    assert anatomy(serial).placement == "pre-ln"
    assert anatomy(parallel).placement == "parallel"


def test_a_factor_of_zero_leaves_nothing_to_measure():
    assert anatomy(strange.plain(strange.LayerScale, value=0.0)).placement == "unknown"


def test_blocks_that_differ_are_told_apart():
    torch.manual_seed(0)
    found = anatomy(strange.model_of(strange.Block(), strange.Sandwich(), strange.ScaledStream()))
    assert found.placements == ["pre-ln", "sandwich", "unknown"]
    assert found.placement == "unknown"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: strange.model_of(*[strange.Block()] * 3), "block 0 runs 3 times"),
        (lambda: strange.plain(strange.Overwrites), "block 0 overwrites its input"),
        (lambda: strange.plain(strange.Block, between=lambda x: 1.1 * x), "block 1: its input is not"),
        (lambda: strange.model_of(*[strange.Block() for _ in range(5)], layers=3), "no list of 3 blocks"),
        (
            lambda: strange.Reversible(strange.Config(), [strange.TwoStreams() for _ in range(3)]),
            "a second hidden",
        ),
    ],
)
def test_stacks_that_hand_no_single_stream_on_are_refused(build, message):
    with pytest.raises(InputError, match=message) as error:
        anatomy(build())
    assert "\n" not in str(error.value)


def test_a_model_that_wants_more_than_tokens_is_refused_by_its_own_words():
    model = strange.plain(strange.Block)

    def more(*_, **__):
        raise ValueError("give it an image")

    model.layers[0].register_forward_pre_hook(more)
    with pytest.raises(InputError, match=r"token ids alone fails \(ValueError: give it an image\)"):
        anatomy(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "olmo2", "opt-post", "bloom"])
def test_the_verdict_does_not_depend_on_the_precision(name, dtype):
    expected = anatomy(tiny_model(name)).placement
    assert anatomy(tiny_model(name).to(dtype)).placement == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_broken_weight_moves_no_norm(path, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].get_submodule(path).weight[3, 3] = value
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    assert anatomy(model).placement == "pre-ln"  # whoever measures then finds and names the place
    for name, kept in model.state_dict().items():
        assert torch.equal(kept.nan_to_num(7.0, 8.0), weights[name].nan_to_num(7.0, 8.0))


def test_dropout_modes_are_left_as_they_were():
    model = strange.plain(strange.Dropping).train()
    model.layers[1].eval()
    assert anatomy(model).placement == "pre-ln"
    assert model.training
    assert model.layers[0].training
    assert not model.layers[1].training
    assert not model.layers[1].dropout.training


BEHIND = {
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "exaone4": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt-post": ("self_attn_layer_norm", "final_layer_norm"),
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_norms_behind_the_branches(name):
    found = anatomy(tiny_model(name))
    for index, block in enumerate(found.blocks):
        parts = found.parts(index)
        if name in BEHIND:
            attention, mlp = (block.get_submodule(path) for path in BEHIND[name])
            assert parts.attention_norm_after is attention
            assert parts.mlp_norm_after is mlp
        elif found.placement in ("pre-ln", "parallel"):
            assert parts.attention_norm_after is None
            assert parts.mlp_norm_after is None
        else:
            pytest.fail(f"{name}: where are the norms behind the branches of a {found.placement} model?")


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "olmo2", "gpt_neox"])
def test_the_final_norm_takes_the_last_output_and_nothing_else(name):
    model, seen = tiny_model(name), {}
    found = anatomy(model)
    assert found.final_norm is not None
    found.blocks[-1].register_forward_hook(
        lambda m, args, y: seen.update(y=y if torch.is_tensor(y) else y[0])
    )
    found.final_norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    assert torch.equal(seen["x"], seen["y"])


def test_a_norm_that_takes_something_else_is_not_the_final_norm():
    assert anatomy(tiny_model("bert")).final_norm is None  # the head's own norm follows another layer
    model = strange.plain(strange.Block)
    model.norm.register_forward_pre_hook(lambda m, args: (args[0] + 1.0,))
    assert anatomy(model).final_norm is None
