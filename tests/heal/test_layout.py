from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from preln.base.errors import InputError
from preln.heal import get_recipe, trainable_parameters, trainable_shapes
from preln.heal.preparing.layout import Seam, adapted_modules, find_seams, trained_blocks
from preln.heal.preparing.parts import layout
from preln.heal.preparing.prepare import prepare
from preln.models import ARCHITECTURES, drop_blocks, tiny_model

FORMS = ["head", "partial-2", "full", "lora", "dora", "qlora", "uidl", "distill", "seam", "rate-40"]


@pytest.mark.parametrize(
    ("blocks", "drop", "seams"),
    [
        (8, [3, 4], [Seam(3, 5)]),
        (8, [6, 7], [Seam(6, 8)]),
        (8, [0], [Seam(0, 1)]),
        (8, [5, 1, 2], [Seam(1, 3), Seam(3, 6)]),
        (3, [1], [Seam(1, 2)]),
    ],
)
def test_seams_are_where_neighbours_parted(blocks: int, drop: list[int], seams: list[Seam]) -> None:
    assert find_seams(blocks, drop) == seams
    kept = [i for i in range(blocks) if i not in drop]
    # the slow way: walk over the kept blocks and look at their former places
    slow = [Seam(j, kept[j]) for j in range(len(kept)) if kept[j] != (kept[j - 1] + 1 if j else 0)]
    if kept[-1] != blocks - 1:
        slow.append(Seam(len(kept), blocks))
    assert slow == seams


@pytest.mark.integration
def test_blocks_in_front_of_every_cut_train() -> None:
    found = layout(tiny_model("llama", blocks=5))
    seam = get_recipe("seam")
    assert trained_blocks(seam, found, [5, 6]) == [4]
    assert trained_blocks(seam, found, [1, 2, 5]) == [0, 2]
    with pytest.raises(InputError, match="in front of block 1 there are 0"):
        trained_blocks(seam, found, [0])
    with pytest.raises(InputError, match="needs the removed blocks: give drop"):
        trained_blocks(seam, found, None)
    assert trained_blocks(get_recipe("partial-2"), found, None) == [3, 4]


@pytest.mark.integration
@pytest.mark.parametrize("recipe", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_counts_from_the_configuration_are_what_trains(architecture: str, recipe: str) -> None:
    model, drop = drop_blocks(tiny_model(architecture, blocks=4), [2]), [2]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    if (architecture, recipe) == ("mixtral", "uidl"):
        for each in (model, empty):
            with pytest.raises(InputError, match="experts in one tensor"):
                trainable_shapes(each, recipe)
        return
    shapes = trainable_shapes(empty, recipe, drop=drop)
    assert shapes == trainable_shapes(model, recipe, drop=drop)
    assert shapes == trainable_shapes(copy.deepcopy(model).to("meta"), recipe, drop=drop)
    prepared = prepare(model, recipe, drop=drop)
    assert shapes == {name: tuple(p.shape) for name, p in prepared.parameters.items()}
    needing = [p for p in prepared.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in needing) == trainable_parameters(empty, recipe, drop=drop) > 0
    assert {id(p) for p in needing} == {id(p) for p in prepared.parameters.values()}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora", 15_728_640),
        ("reassess-qlora", 15_728_640),
        ("head", 525_340_672),
        ("partial-1", 743_452_672),
        ("partial-2", 961_564_672),
        ("partial-3", 1_179_676_672),
        # rank 8 on gate, up, down of 24 blocks; a length for each of 43,008 outputs of a block
        ("uidl", 24 * 8 * 3 * (4096 + 14336)),
        ("dora", 15_728_640 + 24 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)),
        ("rate-40", 2 * 15_728_640),
        ("full", 128256 * 4096 + 525_340_672 + 24 * (743_452_672 - 525_340_672)),
        ("seam", 743_452_672 - 525_340_672),
    ],
)
def test_counts_of_llama_8b_less_8_blocks(name: str, count: int) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert trainable_parameters(model, name, drop=range(23, 31)) == count


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maps_of_the_mlp_without_running_and_by_running(architecture: str) -> None:
    model = tiny_model(architecture, blocks=2)
    empty = copy.deepcopy(model).to("meta")
    uidl, lora = get_recipe("uidl"), get_recipe("lora")
    every = set(adapted_modules(model, layout(model), lora))
    if architecture in ("mixtral", "qwen3_moe"):
        with pytest.raises(InputError, match="experts in one tensor"):
            adapted_modules(model, layout(model), uidl)
        return
    mlp = set(adapted_modules(model, layout(model), uidl))
    assert mlp == set(adapted_modules(empty, layout(empty), uidl))
    assert mlp < every
    # what is left out reads or writes attention, which every architecture has in each of two blocks
    rest = {name.rpartition(".")[0] for name in every - mlp}
    assert len({".".join(name.split(".")[:4]) for name in rest}) >= 2
    shapes = {tuple(model.get_submodule(name).weight.shape) for name in mlp}
    assert all(max(shape) > 64 for shape in shapes), (
        "a map of an MLP is wider than the hidden size on one side"
    )
