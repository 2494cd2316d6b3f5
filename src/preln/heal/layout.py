"""Where the parts that recipes speak of sit in a model, by name, and how many parameters they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from preln.base.errors import InputError
from preln.heal.recipes import Recipe, get_recipe
from preln.models import anatomy, find_blocks, is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Names of the parts of a causal model, valid in every copy of it.

    Attributes:
        blocks: Dotted names of the blocks, in order.
        final_norm: Name of the norm before the head, or None.
        head: Name of the head.
        tied: Whether the head shares its weight with the embedding.
    """

    blocks: tuple[str, ...]
    final_norm: str | None
    head: str
    tied: bool

    def tail(self, count: int) -> list[str]:
        """Names of the last ``count`` blocks, the final norm and the head."""
        norm = [] if self.final_norm is None else [self.final_norm]
        return [*self.blocks[len(self.blocks) - count :], *norm, self.head]


def layout(model: PreTrainedModel) -> Layout:
    """Find the parts by running the model once; on the meta device, from its modules alone.

    Raises:
        InputError: The model has no head, or no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__}: has no language-model head: load a causal language model")
    if head.weight.is_meta:
        path, blocks = find_blocks(model)
        norm = _norm_without_running(model, path)
    else:
        found = anatomy(model)
        blocks = found.blocks
        norm = None if found.final_norm is None else names[id(found.final_norm)]
    return Layout(tuple(names[id(block)] for block in blocks), norm, names[id(head)], is_tied(model))


def _norm_without_running(model: PreTrainedModel, path: str) -> str | None:
    """The last module outside the blocks whose parameters are all vectors of the model's width."""
    width = model.config.get_text_config().hidden_size
    candidates = [
        name
        for name, module in model.named_modules()
        if not name.startswith(f"{path}.")
        and (own := list(module.parameters(recurse=False)))
        and all(tuple(parameter.shape) == (width,) for parameter in own)
    ]
    return candidates[-1] if candidates else None


def check_fits(recipe: Recipe, found: Layout) -> None:
    """Whether the model has the blocks that the recipe trains.

    Raises:
        InputError: It has fewer.
    """
    if recipe.blocks > len(found.blocks):
        raise InputError(
            f"recipe {recipe.name}: trains {recipe.blocks} blocks, but the model has {len(found.blocks)}: "
            f"use partial-{len(found.blocks)} or fewer"
        )


def tail_parameters(model: PreTrainedModel, found: Layout, count: int) -> dict[str, nn.Parameter]:
    """Parameters of the last ``count`` blocks, the final norm and the head, by full name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix in found.tail(count)
        for name, parameter in model.get_submodule(prefix).named_parameters()
    }


def adapted_modules(model: PreTrainedModel, found: Layout, recipe: Recipe) -> dict[str, nn.Module]:
    """The linear maps that get an adapter, by full name: the recipe's targets, or all where one is missing.

    Raises:
        InputError: The blocks hold no linear map.
    """
    wanted = set(recipe.adapter.targets) if recipe.adapter is not None else set()
    linear: dict[str, nn.Module] = {}
    has_all = True
    for block in found.blocks:
        inside = {n: m for n, m in model.get_submodule(block).named_modules() if is_linear(m)}
        has_all = has_all and wanted <= {name.rpartition(".")[2] for name in inside}
        linear.update({f"{block}.{name}": module for name, module in inside.items()})
    if has_all:
        linear = {name: module for name, module in linear.items() if name.rpartition(".")[2] in wanted}
    if not linear:
        raise InputError(f"recipe {recipe.name}: the blocks hold no linear map to adapt: use partial-1")
    return linear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` or GPT-2's transposed ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's ``Conv1D``, a linear map stored as ``[inputs, outputs]``."""
    return type(module).__name__ == "Conv1D"


def trainable_shapes(model: PreTrainedModel, recipe: str | Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a recipe trains, by stored name, without copying or changing the model.

    Works on a model on the meta device, so that counts need a configuration only.

    Raises:
        InputError: Unknown recipe, or one that does not fit the model.
    """
    chosen = get_recipe(recipe)
    found = layout(model)
    check_fits(chosen, found)
    if chosen.adapter is None:
        return {n: tuple(p.shape) for n, p in tail_parameters(model, found, chosen.blocks).items()}
    rank = chosen.adapter.rank
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in adapted_modules(model, found, chosen).items():
        weight = module.get_parameter("weight")
        first, second = weight.shape
        inputs, outputs = (first, second) if is_transposed(module) else (second, first)
        shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (outputs, rank)
    return shapes


def trainable_parameters(model: PreTrainedModel, recipe: str | Recipe) -> int:
    """Number of parameters that a recipe trains: a shared head counts, since it is cloned before it trains.

    Raises:
        InputError: Unknown recipe, or one that does not fit the model.
    """
    return sum(math.prod(shape) for shape in trainable_shapes(model, recipe).values())
