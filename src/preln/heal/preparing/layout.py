"""What a recipe trains in a model, by name, and how many parameters that is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from preln.base.errors import InputError
from preln.heal.options.recipes import Recipe, get_recipe
from preln.heal.preparing.parts import Layout, is_linear, is_transposed, layout
from preln.models import check_drop, is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seam:
    """A place where removed blocks stood: the states there are ``x[student]`` and ``x[teacher]``.

    Attributes:
        student: Kept blocks in front of it, which is the depth of the state in the pruned model.
        teacher: Depth in the unpruned model: the index of the first kept block behind the cut, or L.
    """

    student: int
    teacher: int


def find_seams(blocks: int, drop: Iterable[int]) -> list[Seam]:
    """The seams that removing ``drop`` from ``blocks`` blocks leaves, in order.

    Raises:
        InputError: See :func:`preln.models.check_drop`.

    >>> find_seams(8, [2, 3, 6])
    [Seam(student=2, teacher=4), Seam(student=4, teacher=7)]
    """
    gone = set(check_drop(drop, blocks))
    depths = [*(index for index in range(blocks) if index not in gone), blocks]
    return [
        Seam(student, depth)
        for student, (former, depth) in enumerate(zip([-1, *depths], depths, strict=False))
        if depth > former + 1
    ]


def trained_blocks(recipe: Recipe, found: Layout, drop: Iterable[int] | None) -> list[int]:
    """Indices of the blocks that a recipe of kind ``tail`` or ``seam`` trains in full.

    Args:
        recipe: The recipe.
        found: Layout of the pruned model.
        drop: The removed blocks, as they were counted in the unpruned model; only ``seam`` needs them.

    Raises:
        InputError: The model has too few blocks, or it is not known what was removed.
    """
    count = len(found.blocks)
    if recipe.kind != "seam":
        if recipe.blocks > count:
            raise InputError(
                f"recipe {recipe.name}: trains {recipe.blocks} blocks, but the model has {count}: "
                f"use partial-{count} or fewer"
            )
        return list(range(count - recipe.blocks, count))
    wanted: set[int] = set()
    for seam in seams_of(recipe, count, drop):
        if seam.student < recipe.blocks:
            raise InputError(
                f"recipe {recipe.name}: trains {recipe.blocks} blocks in front of every cut, but in front of "
                f"block {seam.teacher} there are {seam.student}: use fewer blocks, or partial-1"
            )
        wanted.update(range(seam.student - recipe.blocks, seam.student))
    return sorted(wanted)


def seams_of(recipe: Recipe, count: int, drop: Iterable[int] | None) -> tuple[Seam, ...]:
    """The seams of a pruned model of ``count`` blocks; none where the recipe does not ask for them.

    Raises:
        InputError: The recipe needs to know what was removed, and does not.
    """
    if not recipe.needs_drop:
        return ()
    gone = [] if drop is None else list(drop)
    if not gone:
        raise InputError(f"recipe {recipe.name}: needs the removed blocks: give drop, or use partial-1")
    return tuple(find_seams(count + len(gone), gone))


def full_parameters(
    model: PreTrainedModel, found: Layout, recipe: Recipe, drop: Iterable[int] | None
) -> dict[str, nn.Parameter]:
    """The parameters that a recipe without an adapter trains, by full name; a shared one comes once.

    Raises:
        InputError: See :func:`trained_blocks`.
    """
    if recipe.kind == "full":
        parameters = dict(model.named_parameters())
        if found.tied and not is_tied(model):
            del parameters[f"{found.head}.weight"]
        return parameters
    return {
        f"{prefix}.{name}": parameter
        for prefix in trained_parts(found, recipe, drop)
        for name, parameter in model.get_submodule(prefix).named_parameters()
    }


def trained_parts(found: Layout, recipe: Recipe, drop: Iterable[int] | None) -> list[str]:
    """Names of the modules that a recipe of kind ``tail`` or ``seam`` trains in full.

    Raises:
        InputError: See :func:`trained_blocks`.
    """
    indices = trained_blocks(recipe, found, drop)
    return [found.blocks[i] for i in indices] if recipe.kind == "seam" else found.tail(len(indices))


def adapted_modules(model: PreTrainedModel, found: Layout, recipe: Recipe) -> dict[str, nn.Module]:
    """The linear maps that get an adapter, by full name: the recipe's targets, or all where one is missing.

    Raises:
        InputError: The blocks, or their MLPs where the recipe adapts nothing else, hold no linear map.
    """
    adapter = recipe.adapter
    wanted = set() if adapter is None else set(adapter.targets)
    linear: dict[str, nn.Module] = {}
    has_all = True
    for block, mixing in zip(found.blocks, found.attention, strict=True):
        inside = {n: m for n, m in model.get_submodule(block).named_modules() if is_linear(m)}
        if adapter is not None and adapter.mlp_only:
            inside = {n: m for n, m in inside.items() if not _mixes(f"{block}.{n}", block, mixing)}
        has_all = has_all and wanted <= {name.rpartition(".")[2] for name in inside}
        linear.update({f"{block}.{name}": module for name, module in inside.items()})
    if has_all:
        linear = {name: module for name, module in linear.items() if name.rpartition(".")[2] in wanted}
    if not linear:
        if adapter is not None and adapter.mlp_only:
            why = "the blocks hold no linear map outside attention (experts in one tensor are none): use lora"
        else:
            why = "the blocks hold no linear map to adapt: use partial-1"
        raise InputError(f"recipe {recipe.name}: {why}")
    return linear


def _mixes(name: str, block: str, mixing: str | None) -> bool:
    """Whether a module of a block is part of its attention: as measured, or by its name."""
    if mixing is not None and (name == mixing or name.startswith(f"{mixing}.")):
        return True
    return any("attn" in part or "attention" in part for part in name[len(block) :].lower().split("."))


def trainable_shapes(
    model: PreTrainedModel, recipe: str | Recipe, *, drop: Iterable[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a recipe trains, by stored name, without copying or changing the model.

    Works on a model on the meta device, so that counts need a configuration only.

    Args:
        model: The pruned model.
        recipe: Name or recipe.
        drop: The removed blocks, where the recipe trains around the cut.

    Raises:
        InputError: Unknown recipe, or one that does not fit the model.
    """
    chosen = get_recipe(recipe)
    found = layout(model)
    adapter = chosen.adapter
    if adapter is None:
        return {n: tuple(p.shape) for n, p in full_parameters(model, found, chosen, drop).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in adapted_modules(model, found, chosen).items():
        first, second = module.get_parameter("weight").shape
        inputs, outputs = (first, second) if is_transposed(module) else (second, first)
        stored = f"base_model.model.{name}"
        shapes[f"{stored}.lora_A.weight"] = (adapter.rank, inputs)
        shapes[f"{stored}.lora_B.weight"] = (outputs, adapter.rank)
        if adapter.dora:
            shapes[f"{stored}.lora_magnitude_vector"] = (outputs,)
    return shapes


def trainable_parameters(
    model: PreTrainedModel, recipe: str | Recipe, *, drop: Iterable[int] | None = None
) -> int:
    """Number of parameters that a recipe trains: a shared head counts where it is cloned before it trains.

    Raises:
        InputError: Unknown recipe, or one that does not fit the model.
    """
    return sum(math.prod(shape) for shape in trainable_shapes(model, recipe, drop=drop).values())
