"""From a recipe to a model whose right parameters train, and back to a plain model."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError, require
from preln.heal.layout import Layout, adapted_modules, check_fits, is_transposed, layout, tail_parameters
from preln.heal.recipes import Recipe, get_recipe
from preln.models import untie_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Prepared:
    """A model ready to train.

    Attributes:
        model: What the loop calls; with adapters, peft's wrapper.
        recipe: The recipe that prepared it.
        parameters: The parameters that train, by the names under which they are stored, in optimizer order.
            For adapters these are the names of a PEFT adapter file.
        active: Modules in training mode (dropout on) while a step runs; all others stay in evaluation mode,
            so that a frozen part gives the same output for the same tokens every time.
        notes: Remarks for the manifest and the card.
        head_untied: Whether a head shared with the embedding was cloned.
        adapter_config: peft's configuration of the adapter, or None.
    """

    model: Any
    recipe: Recipe
    parameters: dict[str, nn.Parameter]
    active: list[nn.Module]
    notes: list[str] = field(default_factory=list)
    head_untied: bool = False
    adapter_config: Any = None

    def training_mode(self) -> None:
        """Evaluation mode everywhere but in the parts that train."""
        self.model.eval()
        for module in self.active:
            module.train()

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of the trained tensors, by name."""
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in self.parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into the parameters.

        Raises:
            InputError: A name is missing or unknown, or a shape differs.
        """
        for name in sorted(set(tensors) ^ set(self.parameters)):
            where = "is missing" if name in self.parameters else "does not belong to this model and recipe"
            raise InputError(f"trained tensor {name}: {where}: use the recipe and the model it was made with")
        for name, parameter in self.parameters.items():
            if tensors[name].shape != parameter.shape:
                raise InputError(
                    f"trained tensor {name}: shape {tuple(tensors[name].shape)} does not fit "
                    f"{tuple(parameter.shape)}: use the model it was made with"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


def prepare(model: PreTrainedModel, recipe: str | Recipe, *, seed: int = 0) -> Prepared:
    """A deep copy of ``model`` in which exactly the recipe's parameters require a gradient.

    The given model is left as it is.

    Args:
        model: A causal language model of transformers.
        recipe: Name or recipe.
        seed: Fixes the adapter's initial values.

    Raises:
        InputError: Unknown recipe; more blocks than the model has; a model without a head.
        MissingExtraError: The recipe needs peft, which is not installed.
    """
    chosen = get_recipe(recipe)
    if chosen.adapter is not None:
        _peft()  # before the copy: a missing package should cost no time
    found = layout(model)
    check_fits(chosen, found)
    own = copy.deepcopy(model)
    for parameter in own.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    if chosen.adapter is None:
        prepared = _prepare_tail(own, found, chosen)
    else:
        prepared = _prepare_lora(own, found, chosen, seed)
    narrow = sorted({str(p.dtype) for p in prepared.parameters.values() if p.dtype.itemsize < 4})
    if narrow:
        prepared.notes.append(f"weights train in {', '.join(narrow)}: updates below its precision are lost")
    return prepared


def finish(prepared: Prepared) -> PreTrainedModel:
    """The plain model again: adapters merged into the weights, everything in evaluation mode."""
    model = prepared.model
    if prepared.recipe.adapter is not None:
        model = model.merge_and_unload()
        vars(model).pop("peft_config", None)  # else saving the merged model would look for adapters
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return model.eval()


def _prepare_tail(model: PreTrainedModel, found: Layout, recipe: Recipe) -> Prepared:
    notes = []
    if found.tied:
        # training a shared head would also move the embedding, which the recipe says is frozen
        untie_head(model)
        notes.append("the head was shared with the embedding: it was cloned, and only the head was trained")
    if found.final_norm is None:
        notes.append("the model has no norm before its head")
    parameters = tail_parameters(model, found, recipe.blocks)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    active = [model.get_submodule(name) for name in found.tail(recipe.blocks)]
    return Prepared(model, recipe, parameters, active, notes, head_untied=found.tied)


def _prepare_lora(model: PreTrainedModel, found: Layout, recipe: Recipe, seed: int) -> Prepared:
    peft = _peft()
    config = lora_config(model, found, recipe)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for a property under its former name
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    parameters: dict[str, nn.Parameter] = {
        name.replace(".default.", "."): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    active = [module for name, module in wrapped.named_modules() if name.endswith(".lora_dropout.default")]
    return Prepared(wrapped, recipe, parameters, active, adapter_config=config)


def _peft() -> ModuleType:
    """The package peft, without the remark of bitsandbytes, which it imports, on kernels not used here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return require("peft", extra="heal")
    finally:
        logger.setLevel(level)


def lora_config(model: PreTrainedModel, found: Layout, recipe: Recipe) -> Any:
    """Configuration, for peft, of the recipe's adapter on this model.

    Raises:
        InputError: The recipe has no adapter, or the model nothing to adapt.
        MissingExtraError: peft is not installed.
    """
    peft = _peft()
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
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=all(is_transposed(module) for module in adapted.values()),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
