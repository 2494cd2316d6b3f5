"""From a recipe to a model whose right parameters train, and back to a plain model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.heal.options.recipes import Recipe, get_recipe
from preln.heal.preparing.adapters import (
    adapter_parameters,
    attach,
    lora_config,
    merge,
    require_peft,
    unadapted,
)
from preln.heal.preparing.layout import Seam, full_parameters, seams_of, trained_parts
from preln.heal.preparing.parts import Layout, layout, linear_maps
from preln.heal.preparing.quantise import check_differentiable, quantise, quietly, refuse_quantised
from preln.heal.preparing.sharding import cut, gathered, local
from preln.heal.training.student import checkpoint_blocks, switch_checkpointing
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
        seams: Where blocks were cut, if the recipe asks for it.
        checkpointed: Blocks whose inner states are computed again in the backward pass. transformers does so
            where the block itself, not what is in it, is in training mode.
        shells: The modules that 4-bit ones stand for, by name.
        sharded: Whether every process holds a part of the blocks (:mod:`preln.heal.preparing.sharding`).
    """

    model: Any
    recipe: Recipe
    parameters: dict[str, nn.Parameter]
    active: list[nn.Module]
    notes: list[str] = field(default_factory=list)
    head_untied: bool = False
    adapter_config: Any = None
    seams: tuple[Seam, ...] = ()
    checkpointed: list[nn.Module] = field(default_factory=list)
    shells: dict[str, nn.Module] = field(default_factory=dict)
    sharded: bool = False

    @property
    def plain(self) -> Any:
        """The model itself, out of peft's wrapper."""
        return self.model if self.recipe.adapter is None else self.model.get_base_model()

    def training_mode(self) -> None:
        """Evaluation mode everywhere but in the parts that train.

        Raises:
            InputError: A 4-bit layer no longer passes gradients.
        """
        self.model.eval()
        for module in self.active:
            module.train()
        for block in self.checkpointed:
            block.training = True
        check_differentiable(self.plain, self.shells)

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Whole copies on the CPU of the trained tensors, by name.

        Where they are sharded every process must ask, also one that does not ``keep`` them.
        """
        return gathered(self.parameters, keep=keep)

    def parts(self) -> dict[str, Tensor]:
        """Copies on the CPU of what this process holds of the trained tensors, for :meth:`put`."""
        return {name: local(p).detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`parts` returned back into the parameters."""
        for name, parameter in self.parameters.items():
            local(parameter).copy_(parts[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors, whole ones, into the parameters.

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
        self.put({name: cut(tensors[name], parameter) for name, parameter in self.parameters.items()})


def prepare(
    model: PreTrainedModel,
    recipe: str | Recipe,
    *,
    seed: int = 0,
    drop: Iterable[int] | None = None,
    gradient_checkpointing: bool = False,
    borrowed: bool = False,
) -> Prepared:
    """A copy of ``model`` in which exactly the recipe's parameters require a gradient.

    The given model is left as it is.

    Args:
        model: A causal language model of transformers, its weights not quantised.
        recipe: Name or recipe.
        seed: Fixes the adapter's initial values.
        drop: The blocks that were removed, counted in the unpruned model, where the recipe trains around the
            cut.
        gradient_checkpointing: Whether inner states of the blocks are computed again instead of stored.
        borrowed: Whether the copy's blocks use the memory of the model's, for a caller who shards them before
            anything is trained: then no process holds them twice.

    Raises:
        InputError: Unknown recipe; more blocks than the model has; a model without a head, or quantised.
        MissingExtraError: The recipe needs peft or bitsandbytes, which is not installed.
    """
    chosen = get_recipe(recipe)
    if chosen.adapter is not None:
        require_peft()  # before the copy: a missing package should cost no time
    if chosen.quantised is not None:
        quietly("bitsandbytes")
    refuse_quantised(model)
    found = layout(model)
    gone = None if drop is None else list(drop)
    seams = seams_of(chosen, len(found.blocks), gone)
    blocks = [model.get_submodule(name) for name in found.blocks] if borrowed else []
    lent = [parameter for block in blocks for parameter in block.parameters()]
    if chosen.adapter is None:
        prepared = _prepare_full(model, found, chosen, gone, lent)
    else:
        prepared = _prepare_adapter(model, found, chosen, seed, lent)
    prepared.seams = seams
    if gradient_checkpointing:
        checkpoint_blocks(prepared, found)
    narrow = sorted({str(p.dtype) for p in prepared.parameters.values() if p.dtype.itemsize < 4})
    if narrow:
        prepared.notes.append(f"weights train in {', '.join(narrow)}: updates below its precision are lost")
    return prepared


def finish(prepared: Prepared) -> PreTrainedModel:
    """The plain model again: adapters merged into the weights, everything in evaluation mode.

    Of a 4-bit base it is the de-quantised weights into which the adapters are merged
    (:func:`preln.heal.preparing.adapters.merge`).
    """
    model = prepared.model
    if prepared.checkpointed:
        switch_checkpointing(prepared.plain, on=False)
    if prepared.recipe.adapter is not None:
        model = merge(model, prepared.adapter_config, prepared.shells)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    return model.eval()


def _frozen_copy(
    model: PreTrainedModel, *, sharing: Iterable[nn.Parameter] = (), lent: Iterable[nn.Parameter] = ()
) -> PreTrainedModel:
    """A deep copy without gradients.

    The parameters ``sharing`` are not copied, for what replaces them; those ``lent`` are parameters of their
    own over the same memory.
    """
    aliases = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in lent}
    own = copy.deepcopy(model, {id(parameter): parameter for parameter in sharing} | aliases)
    kept = {id(parameter) for parameter in sharing}
    for parameter in own.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
            parameter.grad = None
    return own


def _prepare_full(
    model: PreTrainedModel,
    found: Layout,
    recipe: Recipe,
    drop: Iterable[int] | None,
    lent: Iterable[nn.Parameter],
) -> Prepared:
    full_parameters(model, found, recipe, drop)  # refused, if at all, before the copy
    own, notes = _frozen_copy(model, lent=lent), []
    untied = found.tied and recipe.kind == "tail"
    if untied:
        # training a shared head would also move the embedding, which the recipe says is frozen
        untie_head(own)
        notes.append("the head was shared with the embedding: it was cloned, and only the head was trained")
    elif found.tied and recipe.kind == "full":
        notes.append("the head shares its weight with the embedding: both were trained as one tensor")
    if found.final_norm is None and recipe.kind == "tail":
        notes.append("the model has no norm before its head")
    parameters = full_parameters(own, found, recipe, drop)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    names = [""] if recipe.kind == "full" else trained_parts(found, recipe, drop)
    active = [own.get_submodule(name) for name in names]
    return Prepared(own, recipe, parameters, active, notes, head_untied=untied)


def _prepare_adapter(
    model: PreTrainedModel, found: Layout, recipe: Recipe, seed: int, lent: Iterable[nn.Parameter]
) -> Prepared:
    config = lora_config(model, found, recipe)
    rest = unadapted(model, found)
    notes = []
    if rest:
        notes.append(f"no adapter on {len(rest)} weights that are no linear maps, such as {rest[0]}")
    shells: dict[str, nn.Module] = {}
    if recipe.quantised is None:
        own = _frozen_copy(model, lent=lent)
    else:
        # a weight that is about to be quantised need not be copied, unless something else uses it too
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        weights = [module.get_parameter("weight") for module in linear_maps(model, found).values()]
        own = _frozen_copy(model, sharing=[weight for weight in weights if uses[id(weight)] == 1])
        shells = quantise(own, linear_maps(own, found))
        notes.append(
            "the blocks' linear maps were kept in 4 bits (NF4): a merged model holds their de-quantised "
            "weights plus the adapter, not the weights before quantisation"
        )
    wrapped = attach(own, config, seed=seed, four_bits=bool(shells))
    active = [module for name, module in wrapped.named_modules() if name.endswith(".lora_dropout.default")]
    parameters = adapter_parameters(wrapped)
    return Prepared(wrapped, recipe, parameters, active, notes, adapter_config=config, shells=shells)
