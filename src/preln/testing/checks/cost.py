"""Operations of healing, counted by torch on a real Llama, against the formulas (HEAL-COST).

All in multiply-adds a token. With w those of a block's linear maps, s of its attention scores and values, h
of the head, and c of LoRA's adapters on one block:

    forward          w + s (+ c)   a block, h the head
    to activations   w + 2s (+ c)  a block, h the head; both operands of the two attention products need one
    to weights       w, or c with adapters; h the head if it is trained

The first block's input needs no gradient under LoRA, so its query, key and value maps skip theirs, q
multiply-adds, and so do their adapters' first factors, 3 r d. A trained tail skips nothing: the gain of its
first norm is trained, which lies behind those maps. Hence, exactly,

    lora       = L (2w + 3s + 3c) + 2h - q - 3rd      head only   = L (w + s) + 3h
    partial k  = L (w + s) + k (2w + 2s) + 3h         head cached = 3h
    cached k   = k (3w + 3s) + 3h

with frozen embeddings, and the final norm trained beside the head (2h instead of 3h for the head alone).
Norms, activations and rotations are elementwise and count nothing. All T^2 scores count, masked ones too, as
the eager implementation forms them: s = 2 T (heads)(head size). One more block adds 2w + 3s + 3c to LoRA and
w + s to partial k, so their ratio tends to a value above 2 as L grows, and to at most 3 exactly if
3c <= w (on Llama-3.1-8B, up to rank 887).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from preln.base.errors import MissingExtraError
from preln.testing.checks.llamas import llama, with_adapters
from preln.testing.properties import Property, Worst
from preln.theory import Evidence

RECIPES = ("lora", "partial", "cached", "head", "head_cached")
NAMES: tuple[str, ...] = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
SHAPES = (
    # as NAMES, then tokens and rank
    (16, 24, 4, 2, 8, 32, 5, 1),
    (8, 10, 2, 2, 2, 13, 16, 8),
    (9, 40, 3, 3, 6, 11, 3, 1),
    (12, 8, 2, 1, 4, 20, 9, 2),
)


class Cost(NamedTuple):
    """Multiply-adds a token: a block's w, s and c, the head's h, and what LoRA's first block skips."""

    w: int
    s: int
    h: int
    c: int
    skipped: int


def cost(config: Mapping[str, int], tokens: int, rank: int) -> Cost:
    """Return the multiply-adds a token from a Llama's shape."""
    d, m = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    pairs = config["num_key_value_heads"] * config["head_dim"]
    q = d * (heads + 2 * pairs)
    adapters = (d + heads) * 2 + (d + pairs) * 2 + (d + m) * 3
    return Cost(
        w=q + heads * d + 3 * d * m,
        s=2 * tokens * heads,
        h=d * config["vocab_size"],
        c=rank * adapters,
        skipped=q + 3 * rank * d,
    )


def expected(recipe: str, parts: Cost, depth: int, blocks: int) -> int:
    """Return the multiply-adds a token of one training step, by the theorem.

    Args:
        recipe: one of `RECIPES`.
        parts: of the model.
        depth: L, the model's blocks.
        blocks: k >= 1, the blocks trained under `partial` and `cached`.
    """
    from preln.theory.cost import operations

    w, s, h, c, skipped = parts
    return operations(depth, blocks, w, s, h, c, skipped)[recipe]


def counted(recipe: str, config: Mapping[str, int], tokens: int, rank: int, depth: int, blocks: int) -> float:
    """Count one forward and backward pass of a real model under a recipe: multiply-adds a token.

    Raises:
        MissingExtraError: transformers or, for `lora`, peft is not installed.
    """
    kept = {"cached": blocks, "head_cached": 0}.get(recipe, depth)
    # Eager: torch's counter does not know the one kernel of scaled_dot_product_attention on CPUs.
    model = llama({**config, "num_hidden_layers": max(kept, 1)}, "cpu", attn_implementation="eager")
    model.model.layers = model.model.layers[:kept]
    if recipe == "lora":
        model = with_adapters(model, rank)
    else:
        trained = {"partial": blocks, "cached": blocks}.get(recipe, 0)
        model.requires_grad_(False)
        for part in (model.lm_head, model.model.norm, *model.model.layers[kept - trained :]):
            part.requires_grad_(True)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    labels = inputs["input_ids"]
    if "cached" in recipe:
        inputs = {"inputs_embeds": torch.ones(1, tokens, config["hidden_size"])}
    return _count(lambda: model(**inputs, labels=labels).loss.backward()) / tokens


def _count(work: Callable[[], None]) -> float:
    """Return the multiply-adds that torch counts; it counts two operations for each."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def heal_cost(rounds: int) -> list[Evidence]:
    """Count every recipe on several shapes and depths; nothing may be left over."""
    exact = Worst("operations a token counted by torch on transformers' Llama against the formulas", 0.0)
    grows = Worst(
        "counted growth of LoRA with one more block over that of partial-k, in [2, 3] exactly if 3c <= w: "
        "disagreement (0 or 1)",
        0.0,
    )
    try:
        for turn in range(min(max(1, rounds // 2), 2 * len(SHAPES))):
            shape = SHAPES[turn % len(SHAPES)]
            config = dict(zip(NAMES, shape, strict=False))
            tokens, rank = shape[-2:]
            parts, blocks = cost(config, tokens, rank), 1 + turn // len(SHAPES)
            found: dict[tuple[str, int], float] = {}
            for depth in (blocks + 1, blocks + 2):
                for recipe in RECIPES:
                    value = counted(recipe, config, tokens, rank, depth, blocks)
                    found[recipe, depth] = value
                    error = abs(value - expected(recipe, parts, depth, blocks))
                    exact.update(torch.tensor([error]), torch.tensor([shape]), recipe=recipe, depth=depth)
            slopes = {r: found[r, blocks + 2] - found[r, blocks + 1] for r in ("lora", "partial")}
            ratio = slopes["lora"] / slopes["partial"]
            holds = 2 <= ratio <= 3
            error = float(holds != (3 * parts.c <= parts.w))
            grows.update(torch.tensor([error]), torch.tensor([shape]), ratio=ratio)
    except MissingExtraError:
        return []
    return [exact.evidence(), grows.evidence()]


PROPERTIES: dict[str, Property] = {"HEAL-COST": heal_cost}
