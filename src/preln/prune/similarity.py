"""Criteria that choose a whole window of neighbouring blocks."""

from __future__ import annotations

import numpy as np

from preln.base.errors import InputError
from preln.prune.evidence import Array, Evidence
from preln.prune.registry import Ranked, criterion


def best_windows(distances: Array, size: int, num_blocks: int, spared: frozenset[int], name: str) -> Ranked:
    """Blocks by the best window that they lie in.

    A block's score is the smallest distance of any window of ``size`` blocks that contains it and no spared
    block. The blocks of the best window thus share the lowest score, and go first; among windows at the same
    distance the deeper one is the best. Blocks that no free window contains get the largest distance of all
    windows, and go last. Among equals the deeper block goes first.

    Args:
        distances: One a window, by its first block.
        size: Blocks in a window.
        num_blocks: Number of blocks.
        spared: Blocks that may not go.
        name: Of the criterion, for errors.

    Raises:
        InputError: No window is free.
    """
    starts = [s for s in range(num_blocks - size + 1) if not spared & set(range(s, s + size))]
    if not starts:
        raise InputError(
            f"{name}: protection leaves no {size} neighbouring blocks: remove fewer, or protect less"
        )
    scores = np.full(num_blocks, np.max(distances))
    free = np.zeros(num_blocks, dtype=bool)
    for start in starts:
        window = slice(start, start + size)
        scores[window] = np.minimum(scores[window], distances[start])
        free[window] = True
    best = min(starts, key=lambda s: (distances[s], -s))
    chosen = np.zeros(num_blocks, dtype=bool)
    chosen[best : best + size] = True
    order = np.lexsort((-np.arange(num_blocks), scores, ~free, ~chosen))
    return Ranked(scores, order.tolist())


def _best(evidence: Evidence, distances: Array, name: str) -> Ranked:
    return best_windows(distances, evidence.size, evidence.num_blocks, evidence.spared, name)


@criterion("angular", "windows")
def angular(evidence: Evidence) -> Ranked:
    """Angle over pi between x[l] and x[l+size] at the last token, least over windows (Gromov et al. 2024).

    "The unreasonable ineffectiveness of the deeper layers" removes the ``size`` neighbouring blocks across
    which the last token of every sequence turns least. See :func:`best_windows` for the scores.
    """
    return _best(evidence, evidence.across_last / evidence.sequences, "angular")


@criterion("angular_all_tokens", "token_windows")
def angular_all_tokens(evidence: Evidence) -> Ranked:
    """As ``angular``, with the mean over all tokens in place of the last token of every sequence."""
    return _best(evidence, evidence.across / evidence.tokens, "angular_all_tokens")


@criterion("angular_sum", "windows")
def angular_sum(evidence: Evidence) -> Ranked:
    """Sum over the window's blocks of the angle between x[l] and x[l+1] at the last token.

    A retelling of ``angular`` that replaces the distance across a window by the way through it: an upper
    bound of it (SIM-TRIANGLE) that may prefer another window (SIM-SUM).
    """
    adjacent = evidence.adjacent_last / evidence.sequences
    sums = np.lib.stride_tricks.sliding_window_view(adjacent, evidence.size).sum(axis=1)
    return _best(evidence, sums, "angular_sum")
