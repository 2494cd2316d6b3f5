"""The registry of healing recipes, and the recipes for runs of a few dozen steps.

A recipe is data (:mod:`preln.heal.options.recipe`): what trains, the loss, the settings. A new one is one
call of :func:`register`, or :func:`override` on one there is. Those with published numbers are in
:mod:`preln.heal.options.presets`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from preln.base.errors import InputError
from preln.heal.options.presets import PRESETS, by_rate, reassess_partial, tail_summary
from preln.heal.options.recipe import LLAMA_LINEAR, LLAMA_MLP, Adapter, Recipe
from preln.heal.options.settings import TrainingSettings

__all__ = [
    "LLAMA_LINEAR",
    "Adapter",
    "Recipe",
    "by_rate",
    "get_recipe",
    "override",
    "recipe_names",
    "register",
]

_REGISTRY: dict[str, Recipe] = {}
_FAMILY = re.compile(r"(reassess-partial|partial|rate)-([1-9][0-9]*)")


def register(recipe: Recipe) -> Recipe:
    """Add a recipe under its name.

    Raises:
        InputError: The name is taken.
    """
    if recipe.name in _REGISTRY:
        raise InputError(f"{recipe.name}: a recipe of this name exists: choose another name")
    _REGISTRY[recipe.name] = recipe
    return recipe


def recipe_names() -> list[str]:
    """Registered names, in the order of registration; any other ``partial-k`` resolves too."""
    return list(_REGISTRY)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name.

    ``partial-k`` and ``reassess-partial-k`` exist for every k >= 1, ``rate-p`` for every whole percentage
    that :func:`by_rate` covers.

    Raises:
        InputError: No such recipe; the line lists those there are.

    >>> get_recipe("partial-5").blocks
    5
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in _REGISTRY:
        return _REGISTRY[recipe]
    match = _FAMILY.fullmatch(str(recipe))
    if match:
        number = int(match[2])
        if match[1] == "rate":
            return by_rate(number / 100)
        return _partial(number) if match[1] == "partial" else reassess_partial(number)
    raise InputError(
        f"recipe {recipe!r}: unknown: choose one of {', '.join(_REGISTRY)}, or partial-k for another number k"
    )


def override(recipe: str | Recipe, **fields: Any) -> Recipe:
    """A recipe with some of its fields replaced: its own, its adapter's or its settings'.

    The name stays; ``source`` names what was changed, so that nobody takes the numbers for published ones.

    Args:
        recipe: Name or recipe.
        **fields: Fields of :class:`Recipe`, :class:`Adapter` or :class:`TrainingSettings` by name. None
            leaves a field as it is. Giving ``steps`` unsets ``epochs``, and the other way round.

    Raises:
        InputError: A name that is no field, a field of an adapter where there is none, a value out of range.

    >>> override("lora", rank=4, learning_rate=3e-4).adapter.rank
    4
    """
    chosen = get_recipe(recipe)
    given = {name: value for name, value in fields.items() if value is not None}
    own, adapters, settings = (_fields(kind) for kind in (Recipe, Adapter, TrainingSettings))
    for name, value in given.items():
        kind = {"settings": TrainingSettings, "adapter": Adapter}.get(name)
        if kind is not None and not isinstance(value, kind):
            raise InputError(f"{name}={value!r}: give a {kind.__name__}, or its fields by name")
        if name not in own | adapters | settings:
            known = ", ".join(sorted(own | adapters | settings))
            raise InputError(f"{name}: no field of a recipe: choose from {known}")
        if name in adapters and chosen.adapter is None and "adapter" not in given:
            raise InputError(f"{name}: recipe {chosen.name} has no adapter: use lora, dora, qlora or uidl")
    if not given:
        return chosen
    told = ", ".join(f"{name}={value}" for name, value in given.items() if name not in ("name", "source"))
    changed = dataclasses.replace(
        chosen, source=f"{chosen.source}; changed: {told}" if told else chosen.source
    )
    changed = dataclasses.replace(changed, **{n: v for n, v in given.items() if n in own})
    if changed.adapter is not None and (new := {n: v for n, v in given.items() if n in adapters}):
        changed = dataclasses.replace(changed, adapter=dataclasses.replace(changed.adapter, **new))
    if new := {n: v for n, v in given.items() if n in settings}:
        changed = dataclasses.replace(changed, settings=changed.settings_for(**new))
    return changed


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


# Runs of a few dozen steps need rates far above the published 1e-5, which hardly moves the weights in that
# time. Validation loss of SmolLM2-135M less 8 blocks after 30 steps of 4 x 128 tokens of documentation:
# reverse order, partial-3, 16.37 -> 5.28 at 1e-3; low block influence, partial-3, 4.36 -> 3.94 at 3e-4 and
# 3.87 at 1e-3; head, 4.20 at 1e-3. Higher rates were not compared, nor the rates of the other recipes.
_SMALL = TrainingSettings(
    steps=30, batch_size=8, learning_rate=1e-3, warmup_steps=3, schedule="linear", eval_every=10
)
_LOW = _SMALL.replaced(learning_rate=1e-4)


def _partial(blocks: int) -> Recipe:
    return Recipe(
        name=f"partial-{blocks}" if blocks else "head",
        kind="tail",
        settings=_SMALL,
        summary=tail_summary(blocks),
        blocks=blocks,
    )


def _adapted(name: str, summary: str, **fields: Any) -> Recipe:
    adapter = fields.pop("adapter", Adapter())
    return Recipe(name=name, kind="lora", settings=_SMALL, summary=summary, adapter=adapter, **fields)


for _recipe in (
    *(_partial(_blocks) for _blocks in range(4)),
    Recipe(name="full", kind="full", settings=_LOW, summary="every parameter; a shared head stays shared"),
    _adapted("lora", "rank-8 adapters on the linear maps of every block, merged afterwards"),
    _adapted("dora", "the same with trained row lengths", adapter=Adapter(dora=True, dropout=0.0)),
    _adapted("qlora", "rank-8 adapters while the blocks' linear maps stay in 4 bits", quantised="nf4"),
    _adapted(
        "uidl",
        "adapters on the MLPs, alpha = rank, while the blocks' linear maps stay in 4 bits",
        adapter=Adapter(alpha=None, targets=LLAMA_MLP, mlp_only=True),
        quantised="nf4",
        supervise="all",
    ),
    _adapted("distill", "rank-8 adapters, towards the logits of the unpruned model", objective="distill"),
    Recipe(
        name="seam",
        kind="seam",
        settings=_SMALL,
        summary="the block in front of every cut, towards the unpruned model's state behind it",
        blocks=1,
        objective="seam",
    ),
    *PRESETS,
):
    register(_recipe)
