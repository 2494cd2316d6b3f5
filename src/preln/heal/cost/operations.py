"""What a recipe costs: the matrix products of one training step, counted from the shapes of the modules.

Floating-point operations a token of the batch, two for a multiply-add; HEAL-COST counts the same in
multiply-adds. A linear map from i to o numbers takes ``2 i o`` forward, ``2 i o`` for the gradient of its
input where anything that trains lies in front of it, ``2 i o`` for that of its weight where it trains. So do
the two factors of an adapter. The two products of attention take ``2 T w`` each in a window of T tokens with
w numbers over all heads: every pair of tokens is counted, as the eager and SDPA formulas have it, masked ones
too. Each needs up to two gradients. The head acts on supervised tokens only.

Not counted: element-wise work, norms, softmax, look-ups, the de-quantising of 4-bit weights, what a fused
attention kernel computes again on its way back, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.heal.cost.shapes import Block, Product, block_products, block_shape, map_shape
from preln.heal.options.recipe import Recipe
from preln.heal.options.recipes import get_recipe
from preln.heal.options.settings import is_whole
from preln.heal.prefix.cache import frozen_depth
from preln.heal.preparing.layout import adapted_modules, seams_of, trained_blocks
from preln.heal.preparing.parts import Layout, is_linear, layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Operations:
    """Floating-point operations a token of one training step.

    Attributes:
        forward: Of the student's forward pass.
        backward: Of its backward pass, with what is computed again there.
        teacher: Of the unpruned model's forward pass, where the recipe has one.
        prefix: Of one forward pass through the frozen blocks in front of all that trains. Without stored
            states it is a part of ``forward``; with them it is apart, and filling the file costs it once.
        products: What ``forward`` and ``backward`` are made of.
    """

    forward: float
    backward: float
    teacher: float = 0.0
    prefix: float = 0.0
    products: tuple[Product, ...] = ()

    @property
    def total(self) -> float:
        """Operations a token of a step: forward, backward and teacher."""
        return self.forward + self.backward + self.teacher


def operations(
    model: PreTrainedModel,
    recipe: str | Recipe,
    *,
    length: int,
    supervised: float | Fraction = 1.0,
    cached: bool = False,
    drop: Iterable[int] | None = None,
    teacher: PreTrainedModel | None = None,
    checkpointing: bool = False,
    causal_half: bool = False,
    pass_tokens: int | None = None,
) -> Operations:
    """Count one training step of a recipe, from module shapes and the configuration alone.

    A model on the meta device will do. Experts count as often as the configuration says that a token visits
    them. DoRA forms ``B A`` once a pass, ``2 r i o``, which is spread over ``pass_tokens``.

    Args:
        model: The pruned model, not quantised.
        recipe: Name or recipe.
        length: T, tokens in a window, packed or padded: attention reaches over all of them.
        supervised: Share of the windows' tokens at which the head is evaluated.
        cached: Whether the states behind the frozen prefix are stored.
        drop: The removed blocks, where the recipe trains around the cut.
        teacher: The unpruned model, where the recipe has one.
        checkpointing: Whether blocks run again in the backward pass: one more forward pass of each that a
            gradient passes through (torch may stop shortly before the end of the block).
        causal_half: Count half of attention, for kernels that skip what a causal mask hides.
        pass_tokens: Tokens that go through the model at a time; None leaves out what DoRA does once a pass.

    Raises:
        InputError: A recipe that does not fit the model; ``cached`` without a frozen prefix; no teacher where
            one is needed; products that shapes do not tell (the line names the module).

    >>> from preln.models import tiny_model
    >>> operations(tiny_model("llama").to("meta"), "head", length=8, cached=True).total == 3 * 2 * 64 * 512
    True
    """
    chosen, share, found = get_recipe(recipe), _share(supervised), layout(model)
    _check_lengths(length, pass_tokens)
    gone = None if drop is None else list(drop)
    count = len(found.blocks)
    depth, last = frozen_depth(chosen, count), count
    if cached and not depth:
        raise InputError(f"recipe {chosen.name}: has no frozen prefix to store: count it without cached")
    seams = seams_of(chosen, count, gone)
    if chosen.objective == "seam":
        last = max(seam.student for seam in seams)
    whole = _whole(chosen, found, gone)
    adapted = set() if chosen.adapter is None else set(adapted_modules(model, found, chosen))
    attention = Fraction(2 * length, 2 if causal_half else 1)

    rows: list[Product] = []
    reached = chosen.kind == "full"  # the embedding trains
    for place in range(depth if cached else 0, last):
        block = block_shape(model, found.blocks[place])
        products = block_products(
            block,
            reached=reached,
            whole=place in whole,
            adapted=adapted,
            adapter=chosen.adapter,
            attention=attention,
            pass_tokens=pass_tokens,
        )
        part = list(products)
        if checkpointing and any(row.backward for row in part):
            part = [_twice(row) for row in part]
        rows += part
        reached = reached or place in whole or any(m.name in adapted for m in block.maps)
    if chosen.objective != "seam":
        rows += _head(model, found, chosen, share)

    taught = Fraction(0)
    if chosen.teacher:
        deep = None if chosen.objective == "distill" else max(seam.teacher for seam in seams)
        taught = _teacher(chosen, teacher, deep, attention, share)
    return Operations(
        forward=float(sum(row.forward for row in rows)),
        backward=float(sum(row.backward for row in rows)),
        teacher=float(taught),
        prefix=float(sum(_forward(block_shape(model, b), attention) for b in found.blocks[:depth])),
        products=tuple(rows),
    )


def prefix_operations(
    model: PreTrainedModel, recipe: str | Recipe, *, length: int, causal_half: bool = False
) -> float:
    """Operations a token of one pass that fills the cache: 0 where the recipe has no frozen prefix.

    Raises:
        InputError: See :func:`operations`.
    """
    _check_lengths(length, None)
    found = layout(model)
    depth = frozen_depth(get_recipe(recipe), len(found.blocks))
    attention = Fraction(2 * length, 2 if causal_half else 1)
    return float(sum(_forward(block_shape(model, name), attention) for name in found.blocks[:depth]))


def _check_lengths(length: int, pass_tokens: int | None) -> None:
    for name, value in (("length", length), ("pass_tokens", 1 if pass_tokens is None else pass_tokens)):
        if not (is_whole(value) and value >= 1):
            raise InputError(f"{name}={value!r}: must be a whole number of at least 1")


def _share(supervised: float | Fraction) -> Fraction:
    if not 0 <= supervised <= 1:
        raise InputError(f"supervised={supervised!r}: give a share of the tokens, from 0 to 1")
    return Fraction(supervised)


def _whole(recipe: Recipe, found: Layout, drop: list[int] | None) -> set[int]:
    """Indices of the blocks that train in full."""
    if recipe.kind == "lora":
        return set()
    return set(range(len(found.blocks)) if recipe.kind == "full" else trained_blocks(recipe, found, drop))


def _twice(row: Product) -> Product:
    return Product(**{**vars(row), "again": row.forward})


def _head(model: Any, found: Layout, recipe: Recipe | None, share: Fraction) -> list[Product]:
    """What follows the blocks; the gradient of its input is always computed.

    Raises:
        InputError: A linear map beside the blocks whose place is not known.
    """
    names = [name for name, _ in model.named_modules()]
    behind = set(names[names.index(found.blocks[-1]) :])
    rows = []
    for name, module in model.named_modules():
        if not is_linear(module) or name.startswith(tuple(f"{block}." for block in found.blocks)):
            continue
        if name != found.head and name not in behind:
            raise InputError(f"{name}: a linear map in front of the blocks: its products are not counted")
        size = share * Fraction(2) * module.weight.numel()
        trains = recipe is not None and (
            recipe.kind == "full" or (recipe.kind == "tail" and name == found.head)
        )
        inputs, outputs = map_shape(module)
        rows.append(Product(name, "head", inputs, outputs, size, size, size * trains))
    return rows


def _forward(block: Block, attention: Fraction) -> Fraction:
    return sum((m.operations for m in block.maps), 2 * attention * block.width)


def _teacher(
    recipe: Recipe, teacher: PreTrainedModel | None, depth: int | None, attention: Fraction, share: Fraction
) -> Fraction:
    """A forward pass to x[depth], or to the logits at supervised tokens.

    Raises:
        InputError: There is no teacher, or it is too shallow.
    """
    if teacher is None:
        raise InputError(f"recipe {recipe.name}: learns from the unpruned model: give teacher")
    found = layout(teacher)
    if depth is not None and depth > len(found.blocks):
        raise InputError(
            f"teacher: has {len(found.blocks)} blocks, and the cut is at {depth}: give its model"
        )
    blocks = found.blocks if depth is None else found.blocks[:depth]
    passed = sum((_forward(block_shape(teacher, name), attention) for name in blocks), Fraction(0))
    if depth is not None:
        return passed
    return passed + sum(row.forward for row in _head(teacher, found, None, share))
