"""Operations of each healing recipe, a token of training (HEAL-COST).

Multiply-adds. A block's forward pass takes w (its weights) plus a (attention's scores and values); going
back to the activations takes w + 2 a, going back to the weights w. The head takes h forward and h each way
back.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic

L, k, w, a, h, c, e = (sp.Symbol(n, positive=True) for n in ("L", "k", "w", "a", "h", "c", "e"))


def operations(
    blocks: Any, tail: Any, weights: Any, attention: Any, head: Any, adapters: Any, skipped: Any = 0
) -> dict[str, Any]:
    """Return multiply-adds a token of one training step.

    Args:
        blocks: L.
        tail: k, the blocks that partial fine-tuning trains.
        weights: w, multiply-adds of one block's linear maps.
        attention: a, those of its scores and of the weighted sum of values.
        head: h, those of the head.
        adapters: c, those of one block's adapters, forward.
        skipped: e, those of what LoRA's first block need not pass on: its q, k and v maps and their adapters'
            first factors, back to an input that needs no gradient.

    Returns:
        `lora` (every linear map of every block), `partial` (last k blocks, final norm, head), `cached` (the
        same on stored outputs of the frozen prefix), `head` (final norm and head), `head_cached`.
    """
    forward, back, trained = weights + attention, weights + 2 * attention, weights
    return {
        "lora": blocks * (forward + back + 3 * adapters) + 2 * head - skipped,
        "partial": blocks * forward + tail * (back + trained) + 3 * head,
        "cached": tail * (forward + back + trained) + 3 * head,
        "head": blocks * forward + 3 * head,
        "head_cached": 3 * head,
    }


@claim(
    "HEAL-COST",
    title="Operations a token of LoRA, partial and cached tail training",
    statement="In multiply-adds a token: LoRA L (2 w + 3 a + 3 c) + 2 h - e, partial-k L (w + a) + k (2 w + "
    "2 a) + 3 h, partial-k on a cached prefix 3 k (w + a) + 3 h, final norm and head L (w + a) + 3 h, on a "
    "cache 3 h. As L grows LoRA/partial tends to (2 w + 3 a + 3 c)/(w + a), above 2, and at most 3 exactly "
    "if 3 c <= w; LoRA/cached grows in proportion to L, and so does partial/cached. Partial costs less than "
    "LoRA exactly if L (w + 2 a + 3 c) > 2 k (w + a) + h + e. The cache costs one forward pass through the "
    "prefix, once, not once an epoch.",
    assumptions=[
        "norms, activations and element-wise work are not counted; no recomputation of activations",
        "w, a: multiply-adds of a block's linear maps, and of its scores and weighted values, forward; c: "
        "of its adapters",
        "e: what LoRA's first block need not pass back to its input (q, k, v and their adapters' first "
        "factors)",
        "k <= L",
    ],
    source="own; the published times are those of Reassessing Layer Pruning in LLMs",
)
def heal_cost() -> list[Evidence]:
    """Add up passes; limits in L by SymPy; comparisons by the solver."""
    cost = operations(L, k, w, a, h, c, e)
    proof = Symbolic("sums over passes; limits in L")
    proof.equal("LoRA", cost["lora"], L * (2 * w + 3 * a + 3 * c) + 2 * h - e)
    proof.equal("partial-k", cost["partial"], L * (w + a) + k * (2 * w + 2 * a) + 3 * h)
    proof.equal("cached", cost["cached"], 3 * k * (w + a) + 3 * h)
    proof.equal("the prefix is what the cache saves", cost["partial"] - cost["cached"], (L - k) * (w + a))
    limit, slope = sp.limit(cost["lora"] / cost["partial"], L, sp.oo), (2 * w + 3 * a + 3 * c)
    proof.equal("LoRA/partial as L grows", limit, slope / (w + a))
    proof.equal(
        "LoRA/cached over L",
        sp.limit(cost["lora"] / cost["cached"] / L, L, sp.oo),
        slope / (3 * k * (w + a) + 3 * h),
    )
    whole = sp.limit(cost["partial"] / cost["cached"] / L, L, sp.oo)
    proof.equal("partial/cached over L", whole, (w + a) / (3 * k * (w + a) + 3 * h))
    proof.reject(
        "LoRA trains no deeper than the tail",
        cost["lora"],
        L * (w + a) + k * (w + 2 * a) + 2 * h + c,
        mutation="other",
    )
    proof.reject(
        "weight gradients forgotten",
        cost["partial"],
        L * (w + a) + k * (w + 2 * a) + 3 * h,
        mutation="term dropped",
    )
    proof.reject("attention forgotten", limit, (2 * w + 3 * c) / w, mutation="term dropped")
    proof.reject(
        "adapters counted once, not in every block", limit, (2 * w + 3 * a) / (w + a), mutation="term dropped"
    )
    compare = Smt("w, a, h, c, e, L, k > 0", [])
    compare.show("the limit is above 2", slope / (w + a) > 2)
    compare.show("and at most 3 exactly if 3 c <= w", sp.Equivalent(slope / (w + a) <= 3, 3 * c <= w))
    cheaper = sp.Equivalent(cost["partial"] < cost["lora"], L * (w + 2 * a + 3 * c) > 2 * k * (w + a) + h + e)
    compare.show("when partial costs less", cheaper)
    compare.show("cached never costs more than partial", cost["cached"] <= cost["partial"], k <= L)
    compare.show("norm and head never cost more than partial", cost["head"] <= cost["partial"])
    compare.reject(
        "partial always costs less", cost["partial"] < cost["lora"], k <= L, mutation="assumption dropped"
    )
    compare.reject(
        "LoRA/partial is at least 2", cost["lora"] >= 2 * cost["partial"], mutation="bound tightened"
    )
    compare.reject(
        "the limit is at most 3 for any adapters", slope / (w + a) <= 3, mutation="assumption dropped"
    )
    compare.reject(
        "cached always costs less than head only", cost["cached"] <= cost["head"], k <= L, mutation="other"
    )
    return [proof.evidence(), compare.evidence()]
