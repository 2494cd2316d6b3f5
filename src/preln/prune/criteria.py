"""The registry of criteria: plain functions from evidence to one score a block; the lowest goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from preln.models.residual import global_gap, wide
from preln.prune.evidence import NEEDS, Array, Evidence


@dataclass(frozen=True)
class Criterion:
    """A named importance of blocks, and what it has to know."""

    name: str
    needs: frozenset[str]
    function: Callable[[Evidence], Array]

    @property
    def summary(self) -> str:
        """First line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *needs: str) -> Callable[[Callable[[Evidence], Array]], Callable[[Evidence], Array]]:
    """Register a function as the criterion ``name``; ``needs`` are entries of ``NEEDS``."""
    unknown = set(needs) - set(NEEDS)
    if unknown or name in CRITERIA:
        raise ValueError(f"criterion {name!r}: registered twice, or unknown needs {unknown}")

    def register(function: Callable[[Evidence], Array]) -> Callable[[Evidence], Array]:
        CRITERIA[name] = Criterion(name, frozenset(needs), function)
        return function

    return register


@criterion("reverse")
def reverse(evidence: Evidence) -> Array:
    """``L - l``: the deeper, the less important; the last block goes first."""
    return np.arange(evidence.num_blocks, 0, -1, dtype=np.float64)


@criterion("random")
def random(evidence: Evidence) -> Array:
    """One seeded random order.

    The mean over many draws is the same for all blocks and orders nothing: draw several seeds, prune by
    each, and average the outcomes instead.
    """
    return np.random.default_rng(evidence.seed).permutation(evidence.num_blocks).astype(np.float64)


@criterion("magnitude_l1")
def magnitude_l1(evidence: Evidence) -> Array:
    """Sum over the block's weights of ``|w|``: norm gains included, biases not."""
    return np.array(
        [
            sum(
                float(wide(p.detach()).abs().sum(dtype=torch.float64))
                for name, p in block.named_parameters()
                if name.endswith("weight")
            )
            for block in evidence.blocks
        ]
    )


@criterion("magnitude_l2")
def magnitude_l2(evidence: Evidence) -> Array:
    """Sum over the block's matrices of their Frobenius norms (not of the squares: the order differs)."""
    return np.array(
        [
            sum(
                float(wide(p.detach()).square().sum(dtype=torch.float64).sqrt())
                for p in block.parameters()
                if p.ndim > 1
            )
            for block in evidence.blocks
        ]
    )


@criterion("taylor", "weight_gradients")
def taylor(evidence: Evidence) -> Array:
    """Sum over the block's parameters of ``|g w|``, g the gradient of the mean loss over all tokens."""
    return evidence.taylor


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
    """``1 - cos`` of the two states of the whole batch, flattened: the largest tokens decide."""
    return np.asarray(global_gap(*evidence.squares))


@criterion("first_order_damage", "gradients")
def first_order_damage(evidence: Evidence) -> Array:
    """``-<dL/dx[l+1], F_l(x[l])>``: to first order, by how much the loss rises without the block."""
    return evidence.damage
