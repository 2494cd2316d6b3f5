"""Recipes with published numbers, under the names of those who published them.

Each says in ``source`` where its numbers come from, and in ``data`` what was trained on there. What a source
does not say keeps this project's default, and ``source`` says so.
"""

from __future__ import annotations

import math

from preln.base.errors import InputError
from preln.heal.options.recipe import LLAMA_MLP, Adapter, Recipe
from preln.heal.options.settings import TrainingSettings, is_real

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
_SHORTENED_SOURCE = "Kim et al. 2024, Shortened LLaMA: Depth Pruning for Large Language Models"
_UIDL_SOURCE = (
    "Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers "
    "(there the rank is 2 to 64 and the length 2048 to 4096, by model; rank 8 and the interval of validation "
    "are this project's)"
)
_ALPACA = "alpaca-cleaned"
_RATES_SOURCE = (
    "a table by pruning rate, retold without a confirmed source "
    "(alpha = 2 r, warm-up and schedule are not in it)"
)
# share removed up to, rank, learning rate, steps at both ends of the row; the rows begin where others end
_RATES = (
    (20, 8, 1e-4, (100, 150)),
    (30, 8, 5e-5, (200, 250)),
    (40, 16, 5e-5, (300, 400)),
    (50, 16, 2e-5, (400, 500)),
)
_LOWEST = 10


def tail_summary(blocks: int) -> str:
    """One line on what a tail of so many blocks trains."""
    if blocks == 0:
        return "the final norm and the head, in full"
    return f"the final norm, the head and the last {'block' if blocks == 1 else f'{blocks} blocks'}, in full"


def reassess_partial(blocks: int) -> Recipe:
    """``reassess-head`` for 0 blocks, else ``reassess-partial-k``."""
    return Recipe(
        name=f"reassess-partial-{blocks}" if blocks else "reassess-head",
        kind="tail",
        settings=_REASSESS,
        summary=f"{tail_summary(blocks)}, with published settings",
        blocks=blocks,
        source=_REASSESS_SOURCE,
        data=_ALPACA,
        template="alpaca",
    )


def by_rate(share: float) -> Recipe:
    """The recipe that the table by pruning rate gives for a share of removed blocks.

    Rank and learning rate are those of the share's row (a boundary belongs to the row below it); the steps go
    linearly from one end of the row to the other. The share is rounded to whole percents, which name the
    recipe.

    Args:
        share: Removed blocks over all blocks, from 0.1 to 0.5.

    Raises:
        InputError: The table has no row for the share.

    >>> by_rate(0.25).name, by_rate(0.25).settings.steps, by_rate(0.25).settings.learning_rate
    ('rate-25', 225, 5e-05)
    """
    percent = round(100 * share) if is_real(share) else -1
    row = next((row for row in _RATES if percent <= row[0]), None)
    if row is None or percent < _LOWEST:
        raise InputError(f"share {share}: the table by pruning rate covers 0.1 to 0.5: use lora")
    upper, rank, rate, (fewest, most) = row
    steps = math.floor(most - (most - fewest) * (upper - percent) / 10)
    settings = TrainingSettings(steps=steps, batch_size=4, learning_rate=rate, eval_every=50)
    return Recipe(
        name=f"rate-{percent}",
        kind="lora",
        settings=settings,
        summary=f"rank-{rank} adapters as the table by pruning rate has them for {percent} % removed",
        adapter=Adapter(rank=rank, alpha=2 * rank),
        source=_RATES_SOURCE,
    )


def _uidl(name: str, learning_rate: float, models: str) -> Recipe:
    return Recipe(
        name=name,
        kind="lora",
        settings=TrainingSettings(
            steps=5000,
            batch_size=16,
            learning_rate=learning_rate,
            warmup_steps=100,
            schedule="cosine",
            eval_every=500,
            checkpoint_every=100,
        ),
        summary=f"adapters on the MLPs over a 4-bit base, with published settings for {models}",
        adapter=Adapter(alpha=None, targets=LLAMA_MLP, mlp_only=True),
        length=2048,
        source=_UIDL_SOURCE,
        quantised="nf4",
        supervise="all",
        data="C4",
    )


PRESETS: tuple[Recipe, ...] = (
    *(reassess_partial(blocks) for blocks in range(4)),
    Recipe(
        name="reassess-lora",
        kind="lora",
        settings=_REASSESS,
        summary="rank-8 adapters on the linear maps of every block, with published settings",
        adapter=Adapter(),
        source=_REASSESS_SOURCE,
        data=_ALPACA,
        template="alpaca",
    ),
    Recipe(
        name="reassess-qlora",
        kind="lora",
        settings=_REASSESS.replaced(optimizer="paged_adamw_8bit", gradient_checkpointing=True),
        summary="the same adapters over a 4-bit base, with published settings",
        adapter=Adapter(),
        source=_REASSESS_SOURCE,
        quantised="nf4",
        data=_ALPACA,
        template="alpaca",
    ),
    Recipe(
        name="shortened-lora",
        kind="lora",
        settings=_REASSESS.replaced(learning_rate=1e-4),
        summary="rank-8 adapters on the linear maps of every block, at ten times the rate of reassess-lora",
        adapter=Adapter(),
        source=_SHORTENED_SOURCE,
        data=_ALPACA,
        template="alpaca",
    ),
    _uidl("uidl-qlora", 3e-4, "models below 70B"),
    _uidl("uidl-qlora-70b", 3e-5, "70B"),
    *(by_rate(row[0] / 100) for row in _RATES),
)
