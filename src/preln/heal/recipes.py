"""The registry of healing recipes: which parameters train, and with which settings unless told otherwise.

A recipe is data. Two kinds exist: ``tail`` trains the final norm, the head and the last ``blocks`` blocks in
full; ``lora`` trains low-rank adapters (Hu et al. 2021) on the linear maps of every block. A new recipe of
either kind is one call of :func:`register`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError
from preln.heal.settings import TrainingSettings

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``W + (alpha / rank) B A``, with ``A`` random and ``B`` zero at the start.

    Attributes:
        rank: Rows of ``A``.
        alpha: Numerator of the scale.
        dropout: Probability of zeroing an input of the adapter while it trains.
        targets: Last names of the linear maps adapted in every block. Where a block lacks one of them
            (another architecture), every linear map of the blocks is adapted. The head never is.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = LLAMA_LINEAR


@dataclass(frozen=True)
class Recipe:
    """What trains, and how by default.

    Attributes:
        name: Name on the command line and in every result.
        kind: ``tail`` or ``lora``.
        settings: Training settings of this recipe unless overridden.
        summary: One line for people.
        blocks: Blocks trained in full, counted from the end (``tail`` only).
        adapter: The adapter (``lora`` only).
        length: Tokens a training row is cut to where rows of text are given.
        source: Where the numbers come from.
    """

    name: str
    kind: str
    settings: TrainingSettings
    summary: str
    blocks: int = 0
    adapter: Adapter | None = None
    length: int = 256
    source: str = "defaults for runs of a few dozen steps"

    def settings_for(self, **overrides: Any) -> TrainingSettings:
        """The recipe's settings with overrides; None leaves a field as it is.

        A warm-up that is not given is cut to a tenth of the steps given, so that a short run still trains.

        Raises:
            InputError: A name that is no setting, or a value out of range.

        >>> get_recipe("lora").settings_for(steps=10).warmup_steps
        1
        """
        steps, warmup = overrides.get("steps"), overrides.get("warmup_steps")
        if isinstance(steps, int) and warmup is None:
            overrides["warmup_steps"] = min(self.settings.warmup_steps, max(steps, 0) // 10)
        return self.settings.replaced(**overrides)

    def described(self) -> dict[str, Any]:
        """The recipe as plain data, without its settings: what decides the form of the trained tensors."""
        entries = dataclasses.asdict(self)
        del entries["settings"], entries["summary"]
        return entries


_REGISTRY: dict[str, Recipe] = {}
_PARTIAL = re.compile(r"(reassess-)?partial-(0|[1-9][0-9]*)")


def register(recipe: Recipe) -> Recipe:
    """Add a recipe under its name.

    Raises:
        InputError: The name is taken, or the kind is unknown.
    """
    if recipe.name in _REGISTRY:
        raise InputError(f"{recipe.name}: a recipe of this name exists: choose another name")
    if recipe.kind not in ("tail", "lora") or (recipe.kind == "lora") != (recipe.adapter is not None):
        raise InputError(f"{recipe.name}: kind {recipe.kind!r} must be tail, or lora with an adapter")
    _REGISTRY[recipe.name] = recipe
    return recipe


def recipe_names() -> list[str]:
    """Registered names, in the order of registration; any other ``partial-k`` resolves too."""
    return list(_REGISTRY)


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name; ``partial-k`` and ``reassess-partial-k`` exist for every k >= 1.

    Raises:
        InputError: No such recipe; the line lists those there are.

    >>> get_recipe("partial-5").blocks
    5
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in _REGISTRY:
        return _REGISTRY[recipe]
    match = _PARTIAL.fullmatch(str(recipe))
    if match and match[2] != "0":
        return _partial(int(match[2]), published=match[1] is not None)
    raise InputError(
        f"recipe {recipe!r}: unknown: choose one of {', '.join(_REGISTRY)}, or partial-k for another number k"
    )


# Runs of a few dozen steps need rates far above the published 1e-5, which hardly moves the weights in that
# time. Validation loss of SmolLM2-135M less 8 blocks after 30 steps of 4 x 128 tokens of documentation:
# reverse order, partial-3, 16.37 -> 5.28 at 1e-3; low block influence, partial-3, 4.36 -> 3.94 at 3e-4 and
# 3.87 at 1e-3; head, 4.20 at 1e-3. Higher rates and adapters were not compared.
_SMALL = TrainingSettings(steps=30, batch_size=8, warmup_steps=3, schedule="linear", eval_every=10)
# "Reassessing Layer Pruning in LLMs" (Lu et al. 2024): 64 rows of 256 tokens, two epochs, best of validation.
_REASSESS = TrainingSettings(
    epochs=2,
    batch_size=64,
    learning_rate=1e-5,
    warmup_steps=100,
    schedule="linear",
    eval_every=100,
    checkpoint_every=100,
    select="best",
)
_REASSESS_SOURCE = "Lu et al. 2024, Reassessing Layer Pruning in LLMs: New Insights and Methods"


def _tail_summary(blocks: int) -> str:
    if blocks == 0:
        return "the final norm and the head, in full"
    return f"the final norm, the head and the last {'block' if blocks == 1 else f'{blocks} blocks'}, in full"


def _partial(blocks: int, *, published: bool) -> Recipe:
    name = f"partial-{blocks}" if blocks else "head"
    if published:
        return Recipe(
            name=f"reassess-{name}",
            kind="tail",
            settings=_REASSESS,
            summary=f"{_tail_summary(blocks)}, with published settings",
            blocks=blocks,
            source=_REASSESS_SOURCE,
        )
    return Recipe(
        name=name,
        kind="tail",
        settings=_SMALL.replaced(learning_rate=1e-3),
        summary=_tail_summary(blocks),
        blocks=blocks,
    )


for _blocks in range(4):
    register(_partial(_blocks, published=False))
register(
    Recipe(
        name="lora",
        kind="lora",
        settings=_SMALL.replaced(learning_rate=1e-3),
        summary="rank-8 adapters on the linear maps of every block, merged afterwards",
        adapter=Adapter(),
    )
)
for _blocks in range(4):
    register(_partial(_blocks, published=True))
register(
    Recipe(
        name="reassess-lora",
        kind="lora",
        settings=_REASSESS,
        summary="rank-8 adapters on the linear maps of every block, with published settings",
        adapter=Adapter(),
        source=_REASSESS_SOURCE,
    )
)
