"""Adapters by peft on the linear maps of the blocks: put on, and merged again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.heal.options.recipes import Recipe
from preln.heal.preparing.layout import adapted_modules
from preln.heal.preparing.parts import Layout, is_transposed, linear_maps
from preln.heal.preparing.quantise import dequantise, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_peft() -> ModuleType:
    """The package peft.

    Raises:
        MissingExtraError: It is not installed.
    """
    return quietly("peft")


def lora_config(model: PreTrainedModel, found: Layout, recipe: Recipe) -> Any:
    """Configuration, for peft, of the recipe's adapter on this model.

    Raises:
        InputError: The recipe has no adapter, or the model nothing to adapt.
        MissingExtraError: peft is not installed.
    """
    peft = require_peft()
    adapter = recipe.adapter
    if adapter is None:
        raise InputError(f"recipe {recipe.name}: has no adapter: use lora")
    adapted = adapted_modules(model, found, recipe)
    local = {name.rpartition(".")[2] for name in adapted}
    everywhere = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in local}
    # short names keep the adapter's configuration legible; full names where a short one matches elsewhere too
    targets = sorted(local) if everywhere == set(adapted) else sorted(adapted)
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.numerator,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=targets,
        fan_in_fan_out=all(is_transposed(module) for module in adapted.values()),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )


def attach(model: Any, config: Any, *, seed: int, four_bits: bool = False) -> Any:
    """The model in peft's wrapper, with adapters whose initial values the seed fixes.

    Args:
        model: Changed in place: its linear maps become peft's layers.
        config: See :func:`lora_config`.
        seed: Fixes the initial values; the caller's generators are left alone.
        four_bits: Whether linear maps are in 4 bits.
    """
    peft = require_peft()
    if four_bits:
        model.is_loaded_in_4bit = True  # where peft looks for it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for a property under its former name
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    if four_bits:
        del model.is_loaded_in_4bit
    return wrapped


def adapter_parameters(wrapped: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that a PEFT adapter file gives them."""
    return {
        name.replace(".default", "").replace(
            "lora_magnitude_vector.weight", "lora_magnitude_vector"
        ): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


def unadapted(model: PreTrainedModel, found: Layout) -> list[str]:
    """Names of the weights of the blocks that are no linear maps, as those of experts in one tensor."""
    maps = set(linear_maps(model, found))
    return [
        f"{block}.{name}"
        for block in found.blocks
        for name, parameter in model.get_submodule(block).named_parameters()
        if parameter.ndim > 1 and f"{block}.{name}".rpartition(".")[0] not in maps
    ]


def merge(wrapped: Any, config: Any, shells: Mapping[str, nn.Module]) -> PreTrainedModel:
    """The plain model with the adapters merged into its weights.

    Where linear maps are in 4 bits, they become plain ones with the de-quantised weights first, and the
    adapters are merged into those: what was trained is what is merged, up to rounding. Merging them into the
    weights as they were before quantisation would give another model than the one that was trained.
    """
    if shells:
        trained = {name: p.detach().clone() for name, p in adapter_parameters(wrapped).items()}
        base = wrapped.unload()
        dequantise(base, shells)
        vars(base).pop("peft_config", None)
        wrapped = attach(base, copy.deepcopy(config), seed=0)
        copy_into(adapter_parameters(wrapped), trained)
    model = wrapped.merge_and_unload()
    vars(model).pop("peft_config", None)  # else saving the merged model would look for adapters
    return model


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
