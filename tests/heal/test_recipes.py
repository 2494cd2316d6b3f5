from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preln.base.errors import InputError
from preln.heal import (
    Recipe,
    TrainingSettings,
    get_recipe,
    recipe_names,
    register,
    train,
    trainable_parameters,
    trainable_shapes,
)
from preln.heal.prepare import finish, prepare
from preln.models import tiny_model

from .helpers import random_tokens, settings

D, FF, V, KV = 64, 128, 512, 32  # of tiny:llama
BLOCK = D * D * 2 + D * KV * 2 + 3 * D * FF + 2 * D
HEAD = V * D + D
LORA_BLOCK = 8 * ((D + D) * 2 + (D + KV) * 2 + (D + FF) * 3)


def test_names_of_the_contract_and_presets() -> None:
    names = {"head", "partial-1", "partial-2", "partial-3", "lora"}
    assert names <= set(recipe_names())
    assert {f"reassess-{name}" for name in names} <= set(recipe_names())


def test_published_presets() -> None:
    for name in ("reassess-head", "reassess-partial-3", "reassess-lora", "reassess-partial-7"):
        recipe = get_recipe(name)
        wanted = recipe.settings
        assert (wanted.learning_rate, wanted.batch_size, wanted.warmup_steps) == (1e-5, 64, 100)
        assert (wanted.epochs, wanted.schedule, wanted.select, recipe.length) == (2, "linear", "best", 256)
    adapter = get_recipe("reassess-lora").adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16, 0.05)


@pytest.mark.parametrize("name", ["partial-0", "partial", "partial--1", "qlorra", "reassess-partial-0", ""])
def test_unknown_recipe(name: str) -> None:
    with pytest.raises(InputError, match="unknown: choose one of head, partial-1"):
        get_recipe(name)


def test_a_registered_name_is_not_replaced() -> None:
    with pytest.raises(InputError, match="exists"):
        register(Recipe("head", "tail", TrainingSettings(steps=1), "twice"))
    with pytest.raises(InputError, match="must be tail, or lora with an adapter"):
        register(Recipe("new", "lora", TrainingSettings(steps=1), "no adapter"))
    assert "new" not in recipe_names()


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
