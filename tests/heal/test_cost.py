from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from preln.base.errors import InputError
from preln.heal import Cache, Examples, TrainingSettings, get_recipe, override
from preln.heal.cost.operations import Operations, operations, prefix_operations
from preln.heal.cost.shapes import block_shape
from preln.heal.prefix.states import build_prefix
from preln.heal.preparing.prepare import prepare
from preln.heal.rows.examples import IGNORED
from preln.heal.training.step import Stepper
from preln.heal.training.teacher import Teacher
from preln.models import ARCHITECTURES, drop_blocks, find_blocks, tiny_model
from preln.testing.checks.cost import NAMES, SHAPES, cost
from preln.theory.cost import operations as formula

pytestmark = pytest.mark.integration
DROP = [1, 3]  # of five blocks: the seams are behind the student's blocks 0 and 1, and block 2 comes last
RECIPES = ["head", "partial-2", "full", "lora", "dora", "qlora", "uidl", "distill", "seam"]


def eager(architecture: str, blocks: int = 5) -> Any:
    """Attention as plain products, which torch's counter sees; so too the experts."""
    model: Any = tiny_model(architecture, blocks=blocks, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    return model


def windows(n: int = 2, length: int = 12, *, packed: bool = False) -> Examples:
    """Windows of which about the second half counts."""
    ids = torch.randint(1, 512, (n, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    documents = (torch.arange(length) >= length // 3).long().expand(n, -1) if packed else None
    return Examples(ids, labels, None, documents)


def four_bits(a: torch.Size, _: Any, shape: Any, *__: Any, **___: Any) -> int:
    """Operations of the product by 4-bit weights, into which torch's counter does not look."""
    return 2 * math.prod(a) * shape[0]


def step_of(
    model: Any,
    recipe: Any,
    rows: Examples,
    *,
    teacher: Any = None,
    folder: Path | None = None,
    checkpointing: bool = False,
) -> int:
    """Operations of the products of one training step, the second, as torch counts them while it runs."""
    chosen = get_recipe(recipe)
    gone = DROP if chosen.needs_drop else None
    prepared = prepare(model, chosen, drop=gone, gradient_checkpointing=checkpointing)
    settings = TrainingSettings(steps=2, batch_size=len(rows))
    depth, prefix = 0, None
    if folder is not None:
        cache = Cache(folder, mode="on")
        depth = cache.wanted(model, chosen, settings, rows)
        prefix = cache.states(model, rows, depth, batch_size=len(rows), label="train")
    target = Teacher(teacher, DROP) if chosen.teacher else None
    stepper = Stepper(prepared, settings, depth=depth, prefix=prefix, teacher=target)
    stepper.training_mode()
    mapping = {}
    if chosen.quantised:
        mapping = {torch.ops.bitsandbytes.gemm_4bit: four_bits}
    places = list(range(len(rows)))
    stepper.gradients(rows, places, 0)  # the first step also finds out how the model is to be run
    for parameter in prepared.parameters.values():
        parameter.grad = None
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        stepper.gradients(rows, places, 1)
    return counter.get_total_flops()


def counted(model: Any, recipe: Any, rows: Examples, **options: Any) -> Operations:
    share = Fraction(rows.supervised, rows.input_ids.numel())
    if get_recipe(recipe).needs_drop:
        options["drop"] = DROP
    return operations(model, recipe, length=rows.input_ids.shape[1], supervised=share, **options)


def in_all(found: float, rows: Examples) -> int:
    """Operations of the whole batch, a whole number."""
    total = found * rows.input_ids.numel()
    assert abs(total - round(total)) < 1e-6
    return round(total)


def maps_of(model: Any) -> list[Any]:
    """The linear maps of all blocks."""
    lists = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    return [m for i in range(len(find_blocks(model)[1])) for m in block_shape(model, f"{lists[0]}.{i}").maps]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_the_count_is_what_torch_counts_in_a_step(architecture: str, recipe: str) -> None:
    model, rows = eager(architecture), windows()
    student = drop_blocks(model, DROP)
    found = counted(student, recipe, rows, teacher=model, pass_tokens=rows.tokens)
    expected = step_of(student, recipe, rows, teacher=model)
    if recipe == "dora":  # peft forms B A from an identity matrix, a product more for every A and pass
        expected -= sum(2 * 8 * m.inputs**2 for m in maps_of(student))
    assert in_all(found.total, rows) == expected
    # negative controls: without attention, or with gradients in the frozen prefix, it is another
    attention = sum(row.forward + row.backward for row in found.products if row.kind == "attention")
    assert in_all(found.total - float(attention), rows) != expected
    assert (found.prefix > 0) == (recipe in ("head", "partial-2"))
    if found.prefix:
        assert in_all(found.total + 2 * found.prefix, rows) != expected


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_counted_exactly_from_an_empty_model(architecture: str) -> None:
    """Norms before and behind the branches, parallel branches, experts, fused and shared maps."""
    model, rows = eager(architecture, blocks=2), windows(2, 8)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    for recipe in ("partial-1", "lora", "full", "uidl"):
        if recipe == "uidl" and architecture in ("mixtral", "qwen3_moe"):
            continue  # has no linear map to adapt
        form = get_recipe(recipe)
        if recipe == "uidl":  # the same products with plain weights
            form = dataclasses.replace(form, quantised=None)
        found = counted(empty, form, rows)
        assert in_all(found.total, rows) == step_of(model, form, rows), recipe
        assert found == counted(model, form, rows)


@pytest.mark.parametrize("recipe", ["head", "partial-2"])
def test_stored_states_take_the_prefix_out_of_the_step(recipe: str, tmp_path: Path) -> None:
    model, rows = eager("llama"), windows()
    found, plain = counted(model, recipe, rows, cached=True), counted(model, recipe, rows)
    assert in_all(found.total, rows) == step_of(model, recipe, rows, folder=tmp_path / "step")
    assert found.prefix == plain.prefix == prefix_operations(model, recipe, length=12)
    assert found.total == plain.total - plain.prefix
    depth = 5 - get_recipe(recipe).blocks
    with FlopCounterMode(display=False) as counter:
        build_prefix(model, rows, [depth], tmp_path / "fill", identity={}, batch_size=1)
    assert counter.get_total_flops() == in_all(found.prefix, rows)


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("k_proj", "down_proj"), ("v_proj",), ("o_proj", "up_proj")]
)
def test_gradients_stop_where_nothing_in_front_trains(targets: tuple[str, ...]) -> None:
    model, rows = eager("llama", blocks=2), windows()
    recipe = override("lora", targets=targets)
    assert in_all(counted(model, recipe, rows).total, rows) == step_of(model, recipe, rows)


def test_packed_windows_cost_what_their_length_does() -> None:
    model, rows = eager("llama", blocks=2), windows(packed=True)
    assert in_all(counted(model, "lora", rows).total, rows) == step_of(model, "lora", rows)


def test_nothing_behind_the_last_seam_is_run() -> None:
    model, rows = eager("llama"), windows()
    student, recipe = drop_blocks(model, DROP), override("lora", objective="seam")
    found = counted(student, recipe, rows, teacher=model)
    assert in_all(found.total, rows) == step_of(student, recipe, rows, teacher=model)
    assert not any(row.kind == "head" or "layers.2" in row.name for row in found.products)


def test_fused_attention_is_not_seen_by_the_counter_and_is_counted_here() -> None:
    model, rows = tiny_model("llama", blocks=2), windows()
    assert model.config._attn_implementation == "sdpa"
    found = counted(model, "lora", rows)
    attention = sum(row.forward + row.backward for row in found.products if row.kind == "attention")
    assert in_all(found.total - float(attention), rows) == step_of(model, "lora", rows)
    half = counted(model, "lora", rows, causal_half=True)
    assert found.total - half.total == pytest.approx(float(attention) / 2)


@pytest.mark.parametrize("recipe", ["lora", "partial-2", "full", "seam"])
def test_checkpointing_pays_another_forward_pass(recipe: str) -> None:
    """Torch stops a block's second pass once all that is needed is there: before its last product."""
    model, rows = eager("llama"), windows()
    student = drop_blocks(model, DROP)
    found = counted(student, recipe, rows, teacher=model, checkpointing=True)
    plain = counted(student, recipe, rows, teacher=model)
    again = [row for row in found.products if row.again]
    assert found.backward - plain.backward == float(sum(row.forward for row in again))
    last = "down_proj B" if recipe == "lora" else "down_proj"
    spared = sum(row.forward for row in again if row.name.endswith(last))
    assert spared > 0
    expected = step_of(student, recipe, rows, teacher=model, checkpointing=True)
    assert in_all(found.total - float(spared), rows) == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_a_llama_costs_what_the_theorem_says(shape: tuple[int, ...], tail: int) -> None:
    tokens, rank, depth = shape[-2], shape[-1], 4
    numbers = dict(zip(NAMES, shape, strict=False))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**numbers, num_hidden_layers=depth, tie_word_embeddings=False))
    w, a, h, c, skipped = cost(numbers, tokens, rank)
    expected = formula(depth, tail, w, a, h, c, skipped)
    partial = f"partial-{tail}" if tail else "head"
    name = {"partial": "head", "cached": "head_cached"} if tail == 0 else {}
    for kind, cached in (("partial", False), ("cached", True)):
        found = operations(model, partial, length=tokens, cached=cached)
        assert found.total == 2 * expected[kind] == 2 * expected[name.get(kind, kind)]
    for lora in ("lora", "qlora"):
        found = operations(model, override(lora, rank=rank), length=tokens)
        assert found.total == 2 * expected["lora"]
    assert found.total != 2 * (expected["lora"] + skipped)


def test_shares_and_passes_that_are_told() -> None:
    model = tiny_model("llama", blocks=2).to("meta")
    whole, half = (operations(model, "head", length=8, supervised=share) for share in (1.0, 0.5))
    assert whole.total - half.total == 3 * 512 * 64  # half of the head, thrice, two operations each
    rare = operations(model, "dora", length=8, pass_tokens=1000)
    lora, dora = operations(model, "lora", length=8), operations(model, "dora", length=8)
    assert lora.total == dora.total
    assert rare.total - dora.total == pytest.approx(
        sum(2 * 8 * m.inputs * m.outputs for m in maps_of(model)) / 1000
    )
    assert operations(model, "full", length=8).prefix == prefix_operations(model, "lora", length=8) == 0


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("lora", {"cached": True}, "lora: has no frozen prefix"),
        ("partial-2", {"cached": True}, "partial-2: has no frozen prefix"),
        ("distill", {}, "distill: learns from the unpruned model: give teacher"),
        ("seam", {}, "needs the removed blocks"),
        ("head", {"supervised": 1.5}, "supervised=1.5: give a share"),
        ("head", {"length": 0}, "length=0: must be a whole number"),
        ("dora", {"pass_tokens": 0}, "pass_tokens=0: must be a whole number"),
        ("partial-3", {}, "trains 3 blocks, but the model has 2"),
    ],
)
def test_questions_without_an_answer(recipe: str, options: dict[str, Any], message: str) -> None:
    model = tiny_model("llama", blocks=2).to("meta")
    with pytest.raises(InputError, match=message):
        operations(model, recipe, **({"length": 8} | options))


def test_products_that_shapes_do_not_tell() -> None:
    experts = tiny_model("mixtral", blocks=1).to("meta")
    vars(experts.config)["num_experts_per_tok"] = None
    with pytest.raises(InputError, match=r"experts\.gate_up_proj: experts, and .* no num_experts_per_tok"):
        operations(experts, "head", length=8)
    other = tiny_model("llama", blocks=1).to("meta")
    other.model.layers[0].self_attn.gate_proj = torch.nn.Linear(64, 64, device="meta")
    with pytest.raises(InputError, match=r"layers\.0: attention that is not made of queries"):
        operations(other, "head", length=8)
    mixer = tiny_model("llama", blocks=1).to("meta")
    mixer.model.layers[0].conv = torch.nn.Conv1d(64, 64, 3, device="meta")
    with pytest.raises(InputError, match=r"conv\.weight: a weight of shape \(64, 64, 3\)"):
        operations(mixer, "head", length=8)
    front = tiny_model("llama", blocks=1).to("meta")
    front.model.embed_tokens.adapter = torch.nn.Linear(64, 64, device="meta")
    with pytest.raises(InputError, match="in front of the blocks"):
        operations(front, "head", length=8)
    teacher = tiny_model("llama", blocks=2).to("meta")
    with pytest.raises(InputError, match="teacher: has 2 blocks"):
        operations(tiny_model("llama", blocks=2).to("meta"), "seam", length=8, drop=[2], teacher=teacher)
