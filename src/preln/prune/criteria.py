"""Criteria that one forward pass, one backward pass, or leaving out single blocks answer for all blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from preln.models.residual import Tokens, global_gap
from preln.prune import attenuation, greedy, similarity, weights
from preln.prune.evidence import Array, Evidence, Request, gather
from preln.prune.registry import CRITERIA, Criterion, criterion
from preln.prune.weights import check_floating

__all__ = ["CRITERIA", "Criterion", "attenuation", "greedy", "random_orders", "similarity", "weights"]


@criterion("reverse")
def reverse(evidence: Evidence) -> Array:
    """``L - l``: the deeper, the less important; the last block goes first."""
    return np.arange(evidence.num_blocks, 0, -1, dtype=np.float64)


@criterion("random")
def random(evidence: Evidence) -> Array:
    """One seeded random order.

    The mean over many draws is the same for all blocks and orders nothing: draw several orders
    (:func:`random_orders`), prune by each, and average the outcomes instead.
    """
    return np.random.default_rng(evidence.seed).permutation(evidence.num_blocks).astype(np.float64)


def random_orders(num_blocks: int, *, draws: int = 5, seed: int = 0) -> pd.DataFrame:
    """Several draws of ``random``: draw, layer, score, rank; draw i is ``random`` under ``seed + i``.

    >>> random_orders(2, draws=2).columns.tolist()
    ['draw', 'layer', 'score', 'rank']
    """
    frames = []
    for draw in range(draws):
        scores = np.random.default_rng(seed + draw).permutation(num_blocks)
        columns = {"draw": draw, "layer": np.arange(num_blocks), "score": scores.astype(float)}
        frames.append(pd.DataFrame(columns | {"rank": scores}))
    return pd.concat(frames, ignore_index=True)


@criterion("taylor", "weight_gradients")
def taylor(evidence: Evidence) -> Array:
    """Sum over the block's parameters of ``|g w|``, g the gradient of the mean loss over all tokens.

    The absolute value is taken once, of the gradient accumulated over all sequences (Kim et al. 2024,
    Shortened LLaMA): gradients of different sequences cancel in it. Compare ``taylor_by_sequence``.
    """
    check_floating(evidence.blocks, "taylor")
    return evidence.taylor


@criterion("taylor_by_sequence", "weight_gradients", shared=False)
def taylor_by_sequence(request: Request) -> Array:
    """Mean over sequences, weighted by targets, of ``sum |g_s w|``, g_s the gradient of one sequence.

    Code that takes the absolute value batch by batch and then adds up gives numbers between this and
    ``taylor``, by the size of its batches; here every sequence is a batch, so that no setting decides. It is
    never below ``taylor``. It needs a backward pass for every sequence by itself.
    """
    check_floating(request.blocks, "taylor_by_sequence")
    tokens, total = request.tokens, int(request.tokens.targets.sum())
    result = 0.0
    for i in range(len(tokens.ids)):
        one = Tokens(tokens.ids[i : i + 1], tokens.real[i : i + 1], tokens.padded)
        share = int(one.targets.sum()) / total
        found = gather(replace(request, tokens=one, batch_size=1), {"weight_gradients"})
        result = result + share * found.taylor
    return np.asarray(result)


@criterion("perplexity", "left_out")
def perplexity(evidence: Evidence) -> Array:
    """Perplexity of the model without the block: exp of the mean loss, weighted by tokens."""
    table = evidence.losses
    kept: pd.DataFrame = table.loc[table["layer"] >= 0]
    layer, weight = kept["layer"].to_numpy(), kept["tokens"].to_numpy()
    return np.exp(np.bincount(layer, kept["loss"].to_numpy() * weight) / np.bincount(layer, weight))


@criterion("block_influence", "states")
def block_influence(evidence: Evidence) -> Array:
    """``1 - mean over tokens of cos(x[l], x[l+1])`` (Men et al. 2024, ShortGPT)."""
    return evidence.gap / evidence.tokens


@criterion("block_influence_global", "states")
def block_influence_global(evidence: Evidence) -> Array:
    """``1 - cos`` of the two states of the whole batch, flattened: the largest tokens decide.

    As the code of "Reassessing Layer Pruning in LLMs" (Lu et al. 2024) computes it; that code never scores
    the last block, which is scored here.
    """
    return np.asarray(global_gap(*evidence.squares))


@criterion("block_influence_shortgpt", "states", "post_norm")
def block_influence_shortgpt(evidence: Evidence) -> Array:
    """Block influence as public ShortGPT code sums it: the last block against the post-norm state.

    Transformers' last hidden state lies behind the final norm, so that code compares x[L-1] with it and not
    with x[L]; a similarity of NaN (a zero state) becomes 1/2; influences are summed over tokens, which does
    not change the order. Unlike there, padding does not count and nothing is computed in float16.
    """
    gap = evidence.gap - 0.5 * evidence.empty
    gap[-1] = evidence.post[0] - 0.5 * evidence.post[1]
    return gap


@criterion("first_order_damage", "gradients")
def first_order_damage(evidence: Evidence) -> Array:
    """``-<dL/dx[l+1], F_l(x[l])>``: to first order, by how much the loss rises without the block."""
    return evidence.damage
