from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preln.base.errors import InputError
from preln.heal import (
    Adapter,
    Recipe,
    TrainingSettings,
    get_recipe,
    recipe_names,
    register,
    train,
    trainable_parameters,
    trainable_shapes,
)
from preln.heal.options.recipes import override
from preln.heal.preparing.prepare import finish, prepare
from preln.models import tiny_model

from .helpers import random_tokens, settings

D, FF, V, KV = 64, 128, 512, 32  # of tiny:llama
BLOCK = D * D * 2 + D * KV * 2 + 3 * D * FF + 2 * D
HEAD = V * D + D
LORA_BLOCK = 8 * ((D + D) * 2 + (D + KV) * 2 + (D + FF) * 3)


def test_names_of_the_contract_and_presets() -> None:
    names = {"head", "partial-1", "partial-2", "partial-3", "lora", "qlora"}
    assert names | {"full", "dora", "uidl", "distill", "seam"} <= set(recipe_names())
    assert {f"reassess-{name}" for name in names} <= set(recipe_names())


def test_recipes_are_what_their_names_say() -> None:
    assert get_recipe("full").kind == "full"
    assert get_recipe("dora").adapter == dataclasses.replace(
        get_recipe("lora").adapter, dora=True, dropout=0.0
    )
    assert get_recipe("qlora").adapter == get_recipe("lora").adapter
    uidl = get_recipe("uidl")
    assert (uidl.quantised, uidl.adapter.mlp_only, uidl.adapter.numerator) == ("nf4", True, uidl.adapter.rank)
    assert override(uidl, rank=3).adapter.numerator == 3
    assert override(uidl, rank=3).described()["adapter"]["alpha"] == 3
    objectives = {name: get_recipe(name).objective for name in ("lora", "distill", "seam")}
    assert objectives == {"lora": "next_token", "distill": "distill", "seam": "seam"}
    assert [get_recipe(name).teacher for name in objectives] == [False, True, True]


BASE = {"name": "new", "settings": TrainingSettings(steps=1), "summary": "wrong"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lora"}, "must be tail, full or seam, or lora with an adapter"),
        ({"kind": "tail", "adapter": Adapter()}, "must be tail"),
        ({"kind": "half"}, "kind 'half'"),
        ({"kind": "tail", "blocks": -1}, "blocks=-1"),
        ({"kind": "seam"}, "blocks=0"),
        ({"kind": "full", "blocks": 2}, "blocks=2: only tail and seam"),
        ({"kind": "full", "quantised": "nf4"}, "4-bit weights do not train: use kind lora"),
        ({"kind": "lora", "adapter": Adapter(), "quantised": "int8"}, "choose nf4"),
        ({"kind": "full", "objective": "mse"}, "choose one of next_token, distill, seam"),
        ({"kind": "tail", "objective": "seam"}, "use kind seam"),
        ({"kind": "full", "temperature": 0.0}, "temperature=0.0"),
        ({"kind": "full", "next_token_weight": 0.5}, "only distill mixes"),
        ({"kind": "full", "objective": "distill", "next_token_weight": 1.5}, "from 0 to 1"),
        ({"kind": "full", "supervise": "none"}, "supervise='none'"),
        ({"kind": "full", "length": 1}, "length=1"),
    ],
)
def test_fields_that_do_not_go_together(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**BASE, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 1.5},
        {"alpha": 0},
        {"dropout": 1.0},
        {"targets": "q_proj"},
        {"dora": 1},
        {"dora": True, "dropout": 0.05},
    ],
)
def test_bad_adapters_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Adapter(**wrong)


def test_override_reaches_recipe_adapter_and_settings_and_says_so() -> None:
    made = override("reassess-lora", rank=4, learning_rate=3e-4, steps=10, length=64, max_grad_norm=None)
    assert (made.adapter.rank, made.adapter.alpha, made.length) == (4, 16, 64)
    wanted = (3e-4, 10, None, 1, 1.0)
    found = made.settings
    assert (found.learning_rate, found.steps, found.epochs, found.warmup_steps, found.max_grad_norm) == wanted
    assert made.source.endswith("; changed: rank=4, learning_rate=0.0003, steps=10, length=64")
    assert get_recipe("reassess-lora").adapter.rank == 8
    assert override("lora") is get_recipe("lora")
    assert override("partial-3", objective="distill", temperature=2.0).blocks == 3
    assert override("lora", adapter=Adapter(rank=2), dropout=0.0).adapter == Adapter(rank=2, dropout=0.0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("lora", {"ranc": 4}, "ranc: no field of a recipe: choose from adapter, alpha"),
        ("head", {"rank": 4}, "rank: recipe head has no adapter: use lora"),
        ("lora", {"rank": 0}, "rank=0"),
        ("lora", {"learning_rate": -1.0}, "learning_rate=-1.0"),
        ("lora", {"blocks": 2}, "only tail and seam train single blocks"),
        ("head", {"quantised": "nf4"}, "4-bit weights do not train"),
        ("head", {"objective": "seam"}, "use kind seam"),
        ("lora", {"settings": 3}, "settings=3: give a TrainingSettings"),
    ],
)
def test_wrong_overrides_are_one_line(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        override(name, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["partial-0", "partial", "partial--1", "qlorra", "reassess-partial-0", ""])
def test_unknown_recipe(name: str) -> None:
    with pytest.raises(InputError, match="unknown: choose one of head, partial-1"):
        get_recipe(name)


def test_a_registered_name_is_not_replaced() -> None:
    with pytest.raises(InputError, match="exists"):
        register(Recipe("head", "tail", TrainingSettings(steps=1), "twice"))
    assert get_recipe("head").summary != "twice"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("head", HEAD),
        ("partial-1", HEAD + BLOCK),
        ("partial-2", HEAD + 2 * BLOCK),
        ("partial-3", HEAD + 3 * BLOCK),
        ("partial-4", HEAD + 4 * BLOCK),
        ("lora", 4 * LORA_BLOCK),
    ],
)
def test_counts_by_hand_and_as_prepared(name: str, count: int) -> None:
    model = tiny_model("llama")
    assert trainable_parameters(model, name) == count
    prepared = prepare(model, name)
    assert {n: tuple(p.shape) for n, p in prepared.parameters.items()} == trainable_shapes(model, name)
    needing = [p for p in prepared.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in needing) == count
    assert {id(p) for p in needing} == {id(p) for p in prepared.parameters.values()}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("lora", 15.73), ("head", 525.34), ("partial-1", 743.45), ("partial-2", 961.56), ("partial-3", 1179.68)],
)
def test_published_counts_of_llama_8b_less_8_blocks(name: str, millions: float) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert round(trainable_parameters(model, name) / 1e6, 2) == millions


@pytest.mark.integration
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "phi3", "mixtral", "gemma2", "bloom"])
def test_counts_without_running_agree_with_counts_by_running(name: str) -> None:
    model = tiny_model(name)
    for recipe in ("head", "partial-2", "lora"):
        assert trainable_shapes(copy.deepcopy(model).to("meta"), recipe) == trainable_shapes(model, recipe)
        prepared = prepare(model, recipe)
        assert {n: tuple(p.shape) for n, p in prepared.parameters.items()} == trainable_shapes(model, recipe)


@pytest.mark.integration
def test_too_many_blocks() -> None:
    with pytest.raises(InputError, match=r"partial-5: trains 5 blocks, but the model has 4: use partial-4"):
        train(tiny_model("llama"), random_tokens(), recipe="partial-5", settings=settings())


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.integration
@pytest.mark.parametrize("name", ["head", "partial-1", "partial-3", "lora"])
def test_a_recipe_changes_what_it_names_and_nothing_else(name: str) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    result = train(model, random_tokens(), recipe=name, settings=settings())
    assert not changed(before, model.state_dict()), "the given model was touched"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    if name == "lora":
        expected = {n for n in before if any(f".{part}.weight" in n for part in LINEAR)}
    else:
        first = 4 - get_recipe(name).blocks
        blocks = tuple(f"model.layers.{i}." for i in range(first, 4))
        expected = {n for n in before if n.startswith((*blocks, "model.norm.", "lm_head."))}
    assert changed(before, result.model.state_dict()) == expected
    assert result.manifest["trainable_parameters"] == trainable_parameters(model, name)


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "phi3", "mixtral"])
def test_lora_adapts_every_linear_map_of_other_blocks_but_not_the_head(architecture: str) -> None:
    model = tiny_model(architecture)
    before = copy.deepcopy(model.state_dict())
    result = train(model, random_tokens(), recipe="lora", settings=settings(steps=3))
    moved = changed(before, result.model.state_dict())
    path = {"gpt2": "transformer.h.", "opt": "model.decoder.layers.", "gpt_neox": "gpt_neox.layers."}
    prefix = path.get(architecture, "model.layers.")
    assert moved
    assert all(name.startswith(prefix) for name in moved)
    if architecture == "gpt2":  # attention in and out, MLP in and out, in each of four blocks
        assert len(moved) == 16


@pytest.mark.integration
def test_a_tied_head_is_cloned_and_the_embedding_stays() -> None:
    model = tiny_model("gpt2")
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight is embedding
    before = embedding.detach().clone()
    result = train(model, random_tokens(), recipe="head", settings=settings())
    assert result.manifest["head_untied"]
    assert any("cloned" in note for note in result.manifest["notes"])
    assert torch.equal(result.model.transformer.wte.weight, before)
    assert not torch.equal(result.model.lm_head.weight, before)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, before)
    # an adapter leaves the tie alone
    merged = finish(prepare(model, "lora"))
    assert merged.lm_head.weight is merged.transformer.wte.weight


@pytest.mark.integration
def test_frozen_parts_do_not_drop_out_and_trained_ones_do() -> None:
    prepared = prepare(tiny_model("gpt2"), "partial-1")  # its configuration has dropout
    prepared.training_mode()
    assert not any(block.training for block in prepared.model.transformer.h[:3])
    assert prepared.model.transformer.h[3].attn.training
    lora = prepare(tiny_model("llama"), "lora")
    lora.training_mode()
    dropouts = [m for m in lora.model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    assert len(dropouts) == 4 * 7
