"""What a training step asks of a machine: the recipe's counted products, and the bytes beside them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from preln.experiment.estimate.workload import LOGIT, MOVED, Load, Shape, Windows
from preln.heal.cost.operations import operations
from preln.heal.cost.shapes import map_shape
from preln.heal.options.recipe import Recipe
from preln.heal.preparing.layout import adapted_modules
from preln.heal.preparing.parts import layout

# of an adapter, forward and back: dropout and its mask, the scaled sum and its gradient, and its two thin
# products, which wait for memory rather than for arithmetic (derived)
ADAPTER_INPUTS, ADAPTER_OUTPUTS = 9.5, 10.0
# AdamW reads four numbers a parameter and writes three; clipping and the new gradient take five (derived)
UPDATE = 12.0
# a de-quantised weight is written and read once a pass, from half a byte (derived)
FOUR_BITS = 0.53
_DORA = 6.0  # passes over a map's weight for the lengths of its rows (derived)


def update(trained: int, shape: Shape) -> Load:
    """One step of AdamW with clipping."""
    return Load(moved=UPDATE * trained * shape.size)


@dataclass(frozen=True)
class Training:
    """What a recipe asks for, a token.

    Attributes:
        step: A training step, by tokens (``operations``, ``moved``) and passes (``read``, ``calls``).
        kept: Numbers a token that are kept for the way back.
        reached: Blocks that a gradient passes through.
        run: Blocks that a step runs.
    """

    step: Load
    kept: float
    reached: int
    run: int


def training(
    model: Any, shape: Shape, recipe: Recipe, rows: Windows, *, cached: int, checkpointing: bool, **told: Any
) -> Training:
    """Load of one training step on ``rows`` (one batch), from the recipe's products.

    Args:
        model: The pruned model on the meta device.
        shape: Its sizes.
        recipe: What trains.
        rows: The rows of a batch.
        cached: Depth whose states are stored, or 0.
        checkpointing: Whether blocks run again in the backward pass.
        **told: ``teacher`` and ``drop`` of :func:`preln.heal.cost.operations.operations`.
    """
    share = Fraction(int(rows.length) - 1, int(rows.length))
    found = operations(
        model,
        recipe,
        length=int(rows.length),
        supervised=share,
        cached=bool(cached),
        checkpointing=checkpointing,
        pass_tokens=int(rows.together),
        **told,
    )
    blocks = layout(model).blocks
    back = {row.name for row in found.products if row.kind != "head" and row.backward}
    reached = sum(any(f"{name}.".startswith(f"{block}.") for name in back) for block in blocks)
    run = shape.blocks - cached
    adapted = adapted_modules(model, layout(model), recipe) if recipe.adapter is not None else {}
    sides = [map_shape(module) for module in adapted.values()]
    extra = sum(ADAPTER_INPUTS * i + ADAPTER_OUTPUTS * o for i, o in sides)
    moved = shape.size * (MOVED * shape.wide * (run + 2 * reached + checkpointing * reached) + extra)
    # the loss is computed once forward and its slope once back
    moved += 2 * LOGIT * 4 * shape.vocabulary * float(share)
    whole = sum(i * o for i, o in sides)
    each_pass = 0.0
    if recipe.quantised is not None:
        each_pass += (FOUR_BITS + 2 * shape.size) * shape.blocks * shape.held * 2
    if recipe.adapter is not None and recipe.adapter.dora:
        each_pass += _DORA * shape.size * whole
    held = shape.held * (run + reached) + 2 * shape.vocabulary * shape.hidden
    step = Load(
        operations=rows.tokens * found.total,
        moved=rows.tokens * moved + rows.passes * each_pass,
        read=rows.passes * shape.size * held,
        calls=rows.passes * (run + 2 * reached),
    )
    kept = reached * (shape.hidden if checkpointing else shape.wide)
    if adapted and not checkpointing:
        kept += 1.25 * sum(i for i, _ in sides)  # dropout's output and mask
    return Training(step, kept + checkpointing * shape.wide, reached, run)
