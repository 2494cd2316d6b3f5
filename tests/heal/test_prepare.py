from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from preln.base.errors import InputError
from preln.heal.options.recipes import get_recipe, override
from preln.heal.preparing.prepare import Prepared, finish, prepare
from preln.heal.training.teacher import Teacher, distillation_loss, seam_loss
from preln.models import drop_blocks, find_blocks, is_tied, tiny_model
from preln.models.through import states_at

from .helpers import random_tokens

pytestmark = pytest.mark.integration
DROP = [2]
RECIPES = ["head", "partial-2", "full", "lora", "dora", "qlora", "uidl", "distill", "seam"]


def objective(prepared: Prepared, teacher: Teacher, ids: Tensor) -> Tensor:
    """The recipe's loss on a batch of tokens, every one of which counts; without chunks."""
    inputs = {"input_ids": ids, "use_cache": False}
    if prepared.recipe.objective == "seam":
        blocks = find_blocks(prepared.plain)[1]
        own = states_at(prepared.model, blocks, inputs, [s.student for s in prepared.seams])
        targets = teacher.states(inputs, [s.teacher for s in prepared.seams])
        losses = [
            seam_loss(own[s.student].flatten(0, 1), targets[s.teacher].flatten(0, 1)) for s in prepared.seams
        ]
        return torch.stack(losses).sum() / ids.numel()
    logits = prepared.model(**inputs).logits.flatten(0, 1)
    if prepared.recipe.objective == "distill":
        hidden = teacher.states(inputs, [teacher.depth])[teacher.depth].flatten(0, 1)
        targets = teacher.logits(hidden, ids.flatten())
        return distillation_loss(logits, targets, prepared.recipe.temperature) / ids.numel()
    return F.cross_entropy(logits.view(*ids.shape, -1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def two_steps(prepared: Prepared, teacher: Teacher, ids: Tensor, rate: float = 1e-3) -> list[float]:
    """The loss of one batch before, between and after two updates of AdamW."""
    optimizer = torch.optim.AdamW(prepared.parameters.values(), lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(2):
        prepared.training_mode()
        loss = objective(prepared, teacher, ids)
        loss.backward()
        assert all(p.grad is not None for p in prepared.parameters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    prepared.model.eval()
    with torch.no_grad():
        return [*losses, float(objective(prepared, teacher, ids))]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2", "mixtral", "gpt_neox"])
def test_every_recipe_trains_finishes_and_reloads(architecture: str, name: str, tmp_path: Path) -> None:
    model, ids = tiny_model(architecture), random_tokens(2, 12)
    teacher, student = Teacher(model, DROP), drop_blocks(model, DROP)
    before = {n: tensor.clone() for n, tensor in student.state_dict().items()}
    if (architecture, name) == ("mixtral", "uidl"):
        with pytest.raises(InputError, match=r"uidl: .*experts in one tensor.*: use lora"):
            prepare(student, name)
        return
    calm = {"dropout": 0.0} if get_recipe(name).adapter is not None else {}
    prepared = prepare(student, override(name, **calm), drop=DROP)
    if architecture == "gpt2":  # its own dropout would make the loss of two steps a matter of luck
        prepared.active = []
    losses = two_steps(prepared, teacher, ids)
    assert losses == sorted(losses, reverse=True), losses
    assert losses[2] < losses[0]
    with torch.no_grad():
        trained = prepared.model(input_ids=ids, use_cache=False).logits
        plain = finish(prepared)
        found = plain(input_ids=ids, use_cache=False).logits
        plain.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        again = loaded(input_ids=ids, use_cache=False).logits
        first = student(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again)
    assert not torch.equal(found, first)
    assert type(loaded) is type(student)
    assert is_tied(loaded) == (is_tied(student) and prepared.recipe.kind != "tail")
    assert [type(m) for m in plain.modules()] == [type(m) for m in student.modules()]
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items()), "the caller's was touched"


def test_full_leaves_the_tie_and_says_so() -> None:
    model = tiny_model("gpt2", blocks=2)
    prepared = prepare(model, "full")
    assert prepared.notes == [
        "the head shares its weight with the embedding: both were trained as one tensor"
    ]
    assert not prepared.head_untied
    assert prepared.model.lm_head.weight is prepared.model.transformer.wte.weight
    assert sum(p.numel() for p in prepared.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert prepare(tiny_model("llama", blocks=2), "full").notes == []


def test_the_seam_trains_the_block_in_front_of_it_alone() -> None:
    student = drop_blocks(tiny_model("llama"), DROP)
    prepared = prepare(student, "seam", drop=DROP)
    assert all(name.startswith("model.layers.1.") for name in prepared.parameters)
    assert len(prepared.parameters) == len(list(student.model.layers[1].parameters()))
    assert [(s.student, s.teacher) for s in prepared.seams] == [(2, 3)]
    with pytest.raises(InputError, match="give drop"):
        prepare(student, "seam")
    adapted = prepare(student, override("lora", objective="seam"), drop=DROP)
    assert adapted.seams == prepared.seams
    assert prepare(student, "lora", drop=DROP).seams == ()


def test_weights_outside_linear_maps_are_told() -> None:
    (note,) = prepare(tiny_model("mixtral", blocks=2), "lora").notes
    assert note == "no adapter on 6 weights that are no linear maps, such as model.layers.0.mlp.gate.weight"
    qlora = prepare(tiny_model("llama", blocks=2), "qlora").notes
    assert len(qlora) == 1
    assert "de-quantised weights plus the adapter" in qlora[0]


def test_a_quantised_copy_shares_nothing_with_the_callers_model() -> None:
    model = tiny_model("llama", blocks=2)
    own = {p.data_ptr() for p in model.parameters()}
    prepared = prepare(model, "qlora")
    assert not own & {p.data_ptr() for p in prepared.model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    twice = tiny_model("llama", blocks=2)
    twice.model.layers[1].mlp.up_proj.weight = twice.model.layers[0].mlp.up_proj.weight
    kept = twice.model.layers[0].mlp.up_proj.weight.detach().clone()
    finish(prepare(twice, "qlora"))
    assert torch.equal(twice.model.layers[0].mlp.up_proj.weight, kept)


def saved_numbers(prepared: Prepared, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of the next-token loss, and how many numbers autograd stored for them."""
    stored = {}
    prepared.training_mode()

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = prepared.model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    slopes = torch.autograd.grad(loss, list(prepared.parameters.values()))
    return dict(zip(prepared.parameters, slopes, strict=True)), sum(stored.values())


@pytest.mark.parametrize("name", ["lora", "qlora", "full", "partial-2", "seam"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_checkpointing_saves_memory_and_changes_no_gradient(architecture: str, name: str) -> None:
    model, ids = tiny_model(architecture), random_tokens(4, 32)
    form = override(name, objective="next_token") if name == "seam" else get_recipe(name)
    if form.adapter is not None:
        form = override(form, dropout=0.0)
    plain = prepare(model, form, drop=[4])
    light = prepare(model, form, drop=[4], gradient_checkpointing=True)
    expected, much = saved_numbers(plain, ids)
    found, less = saved_numbers(light, ids)
    for key, slope in expected.items():
        torch.testing.assert_close(found[key], slope, rtol=1e-5, atol=1e-7)
    assert less < 0.9 * much
    trained = {id(m) for active in light.active for m in active.modules()}
    for block in light.checkpointed:
        frozen = [m for m in block.modules() if m is not block and id(m) not in trained]
        assert not any(m.training for m in frozen), "a frozen part would drop out"
    done = finish(light)
    assert not done.is_gradient_checkpointing
    assert not any(module.training for module in done.modules())


def test_blocks_that_would_drop_out_by_themselves_are_not_checkpointed() -> None:
    model, ids = tiny_model("opt"), random_tokens(2, 8)
    assert find_blocks(model)[1][0].dropout > 0
    form = override("lora", dropout=0.0)
    light = prepare(model, form, gradient_checkpointing=True)
    assert light.notes == ["4 blocks with dropout of their own were not checkpointed"]
    assert light.checkpointed == []
    expected, _ = saved_numbers(prepare(model, form), ids)
    found, _ = saved_numbers(light, ids)
    assert all(torch.equal(found[name], slope) for name, slope in expected.items())
    assert len(prepare(model, "partial-2", gradient_checkpointing=True).checkpointed) == 2


@pytest.mark.parametrize("name", ["full", "dora", "qlora", "uidl", "seam"])
def test_trained_tensors_give_the_same_model_again(name: str) -> None:
    student = drop_blocks(tiny_model("llama"), DROP)
    first = prepare(student, name, drop=DROP)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in first.tensors().items()}
    first.load(tensors)
    stored = first.tensors()
    assert all(torch.equal(stored[n], tensor) for n, tensor in tensors.items())
    again = prepare(student, name, drop=DROP, seed=7)
    again.load(stored)
    states = [finish(each).state_dict() for each in (first, again)]
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in states[0].items())
    with pytest.raises(InputError, match=r"does not belong|is missing"):
        prepare(student, "head").load(stored)
