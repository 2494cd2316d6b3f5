from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

from preln.base.errors import InputError
from preln.heal.options.recipes import override
from preln.heal.preparing.adapters import copy_into
from preln.heal.preparing.prepare import Prepared, finish, prepare
from preln.heal.preparing.quantise import dequantised_weight, quantise
from preln.models import ARCHITECTURES, tiny_model

from .helpers import random_tokens

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
pytestmark = pytest.mark.integration
# the 16 levels of NF4 (Dettmers et al. 2023, appendix E)
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
])  # fmt: skip


def maps(prepared: Prepared) -> dict[str, nn.Module]:
    """The 4-bit layers by name."""
    found = {name: prepared.plain.get_submodule(name) for name in prepared.shells}
    return {name: getattr(layer, "base_layer", layer) for name, layer in found.items()}


def fill(prepared: Prepared, seed: int = 0) -> None:
    """Adapters that do something: at the start, B is zero and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in prepared.parameters.items()}
    copy_into(prepared.parameters, tensors)


def gradients(prepared: Prepared, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the loss with respect to every trained parameter, after a validation pass as the loop makes one."""
    prepared.model.eval()
    with torch.no_grad():
        prepared.model(input_ids=ids, use_cache=False)
    prepared.training_mode()
    return _slopes(prepared, ids)


def _slopes(prepared: Prepared, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = prepared.model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parameters = list(prepared.parameters.values())
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(prepared.parameters, slopes, strict=True))


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error over the tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - e).norm() / e.norm().clamp_min(1e-12)) for n, e in expected.items())


def unquantised(model: nn.Module, prepared: Prepared) -> nn.Module:
    """A copy of the model with the weights that the 4-bit layers stand for, in float32."""
    plain = copy.deepcopy(model)
    for name, layer in maps(prepared).items():
        module, weight = plain.get_submodule(name), dequantised_weight(layer)
        module.weight.data = weight.t().contiguous() if type(module).__name__ == "Conv1D" else weight
    return plain


@pytest.mark.parametrize("recipe", ["qlora", "uidl", "qdora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_gradients_of_adapters_over_a_4_bit_base(architecture: str, recipe: str) -> None:
    model, ids = tiny_model(architecture, blocks=3), random_tokens(2, 10)
    form = override("qlora" if recipe == "qdora" else recipe, dora=recipe == "qdora", dropout=0.0)
    prepared = prepare(model, form)
    wide = dataclasses.replace(form, quantised=None)
    plain, dense = prepare(unquantised(model, prepared), wide), prepare(model, wide)
    for each in (prepared, plain, dense):
        fill(each)
    found = gradients(prepared, ids)
    assert gap(found, gradients(plain, ids)) < 1e-4
    assert gap(found, gradients(dense, ids)) > 1e-2, "the comparison cannot tell 4 bits from 32"


@pytest.mark.skipif(
    not getattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)(),
    reason="bitsandbytes has the kernel for inference on CPUs with AVX512-BF16 only",
)
@pytest.mark.parametrize("training", [False, True])
def test_the_kernel_for_inference_would_give_wrong_gradients(training: bool) -> None:
    model, ids = tiny_model("llama", blocks=3), random_tokens(2, 10)
    form = override("qlora", dropout=0.0)
    right, wrong = prepare(model, form), prepare(model, form)
    for each in (right, wrong):
        fill(each)
    expected = gradients(right, ids)
    for layer in maps(wrong).values():
        layer.support_avx512bf16_for_cpu = True
    wrong.model.eval()
    for layer in maps(wrong).values():
        layer.train(training)  # it switches in evaluation mode only
    with torch.no_grad():
        wrong.model(input_ids=ids, use_cache=False)
    packed = {getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in maps(wrong).values()}
    assert packed == {not training}
    if training:
        assert gap(_slopes(wrong, ids), expected) < 1e-4
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks once that the kernel has no gradient
        assert gap(_slopes(wrong, ids), expected) > 0.5
    with pytest.raises(InputError, match="packed its 4-bit weight for inference"):
        wrong.training_mode()
    right.training_mode()


def test_four_bits_are_the_nearest_levels_of_each_group() -> None:
    holder = nn.ModuleDict({"map": nn.Linear(192, 96)})
    weight = holder["map"].weight.detach().clone()
    quantise(holder, dict(holder.items()))
    groups = weight.reshape(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    nearest = (groups / scale)[..., None].sub(NF4).abs().argmin(-1)
    slow = (NF4[nearest] * scale).reshape(96, 192)
    found = dequantised_weight(holder["map"])
    # the scales themselves are kept in 8 bits
    assert float((found - slow).norm() / slow.norm()) < 0.02
    assert 0.05 < float((found - weight).norm() / weight.norm()) < 0.12
    assert holder["map"].weight.numel() == weight.numel() // 2
    uneven = nn.ModuleDict({"map": nn.Linear(7, 5)})
    quantise(uneven, dict(uneven.items()))
    assert dequantised_weight(uneven["map"]).shape == (5, 7)
    assert uneven["map"](torch.randn(2, 7)).shape == (2, 5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_merged_is_what_was_trained(architecture: str) -> None:
    model, ids = tiny_model(architecture, blocks=2), random_tokens(2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare(model, "qlora")
    fill(prepared)
    prepared.model.eval()
    with torch.no_grad():
        trained = prepared.model(input_ids=ids, use_cache=False).logits
        weights = {n: p.detach().clone() for n, p in prepared.parameters.items()}
        plain = finish(prepared)
        merged = plain(input_ids=ids, use_cache=False).logits
        # the adapter on the weights as they were is another model
        other = prepare(model, "lora")
        copy_into(other.parameters, weights)
        undone = finish(other)(input_ids=ids, use_cache=False).logits
    scale = float(trained.abs().max())
    assert float((merged - trained).abs().max()) < 2e-5 * max(scale, 1.0)
    assert float((undone - trained).abs().max()) > 1e-3 * scale
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert plain.state_dict().keys() == before.keys()
    assert {n: t.shape for n, t in plain.state_dict().items()} == {n: t.shape for n, t in before.items()}
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), (
        "the caller's was touched"
    )
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("recipe", ["lora", "dora", "qlora", "uidl"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_stored_adapter_is_one_that_plain_peft_loads(
    architecture: str, recipe: str, tmp_path: object
) -> None:
    import peft
    from safetensors.torch import save_file

    model, ids = tiny_model(architecture, blocks=2), random_tokens(2, 8)
    prepared = prepare(model, recipe)
    fill(prepared)
    config = copy.copy(prepared.adapter_config)
    config.inference_mode = True
    config.save_pretrained(tmp_path)
    save_file(prepared.tensors(), f"{tmp_path}/adapter_model.safetensors", metadata={"format": "pt"})
    base = copy.deepcopy(model) if prepared.recipe.quantised is None else unquantised(model, prepared)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    prepared.model.eval()
    with torch.no_grad():
        expected = prepared.model(input_ids=ids, use_cache=False).logits
        found = loaded(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # older versions of peft would ask the hub whether the vocabulary has grown
    stored = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert set(stored) == set(prepared.parameters)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_keep_their_dtype(dtype: str) -> None:
    narrow = getattr(torch, dtype)
    model, ids = tiny_model("llama", blocks=2).to(narrow), random_tokens(2, 8)
    prepared = prepare(model, "qlora")
    fill(prepared)
    slopes = gradients(prepared, ids)
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes.values())
    plain = finish(prepared)
    assert {p.dtype for p in plain.parameters()} == {narrow}


def test_weights_that_cannot_be_quantised_are_named() -> None:
    with pytest.raises(InputError, match=r"q_proj: a weight in float64 has no 4-bit form"):
        prepare(tiny_model("llama", blocks=2).double(), "qlora")
    twice = tiny_model("llama", blocks=2)
    layers = {n: m for n, m in twice.named_modules() if n.endswith("q_proj")}
    quantise(twice, layers)
    for recipe in ("lora", "qlora", "head"):
        with pytest.raises(InputError, match=r"is quantised already: load the model in float32"):
            prepare(twice, recipe)
