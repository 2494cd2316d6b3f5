"""Scores of every block under any criteria, on the same tokens, from shared passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.models import find_blocks
from preln.models.residual import as_tokens
from preln.prune.criteria import CRITERIA
from preln.prune.evidence import Request, gather
from preln.prune.plan import protected_blocks
from preln.prune.registry import choose_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["choose_metrics", "leave_one_out", "make_request", "score"]


def how_many(size: int | None, count: int, what: str = "blocks") -> int:
    """How many of ``count`` are to go: ``size``, or a quarter.

    Raises:
        InputError: None, or all.
    """
    if size is None:
        return max(1, round(count / 4))
    if isinstance(size, bool) or not 1 <= size < count:
        raise InputError(f"size {size} of {count} {what}: remove at least 1 and keep at least 1")
    return size


def make_request(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"] | None,
    *,
    batch_size: int,
    seed: int = 0,
    size: int | None = None,
    protect: str = "none",
) -> Request:
    """Check what a caller asks for; see :func:`score`.

    Raises:
        InputError: Bad tokens, size, preset, or more blocks to go than may.
    """
    blocks = find_blocks(model)[1]
    count = len(blocks)
    spared, tokens = frozenset(protected_blocks(protect, count)), as_tokens(batch, attention_mask)
    wanted = how_many(size, count)
    if size is None:
        wanted = max(1, min(wanted, count - len(spared)))
    elif wanted > count - len(spared):
        raise InputError(f"size {size}: protection {protect!r} leaves only {count - len(spared)} to remove")
    return Request(model, tokens, batch_size, seed, wanted, spared, blocks)


def score(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    metrics: str | Iterable[str] = "all",
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    size: int | None = None,
    protect: str = "none",
) -> pd.DataFrame:
    """Importance of every block: metric, layer, score, rank (0 is removed first).

    Criteria share passes over the tokens (see :func:`preln.prune.evidence.gather`). The model is left as it
    was. ``"all"`` means every criterion that reads those shared passes; greedy and iterative ones, and those
    with passes of their own, are asked for by name: ``sleb``, ``taylor_by_sequence``,
    ``attenuated_contribution``, and ``METRIC@k`` for any one-shot METRIC (remove k, score again, repeat).

    Criteria that choose a set choose it for one ``size``: their first ``size`` ranks are the set. For windows
    (``angular``, ``angular_all_tokens``, ``angular_sum``) a block's score is the least distance of any window
    that it lies in; for greedy and iterative criteria it is the score of the round in which it went, those
    left over following with their scores of the last round. The table's ``attrs`` hold size and protection.

    Args:
        model: A causal model.
        batch: Calibration tokens; never the tokens that results are reported on.
        metrics: Names from :data:`preln.prune.CRITERIA`, comma-separated or as a list, or ``"all"``.
        attention_mask: 1 for real tokens; None if all are.
        batch_size: Sequences in one pass; no score depends on it.
        seed: For criteria that draw.
        size: How many blocks are to go (default: a quarter, at least one).
        protect: Preset whose blocks may not go; one-shot criteria score them all the same.

    Raises:
        InputError: Bad tokens, an unknown metric or one over halves, a size that cannot be removed, or values
            that are not finite.
    """
    names = choose_metrics(metrics)
    request = make_request(
        model, batch, attention_mask, batch_size=batch_size, seed=seed, size=size, protect=protect
    )
    chosen = [CRITERIA[name] for name in names]
    needs = frozenset().union(*(c.needs for c in chosen if c.shared))
    evidence = gather(request, needs)
    frames = []
    for each in chosen:
        found = each.rank(evidence if each.shared else request)
        layers = np.arange(len(found.scores))
        columns = {"metric": each.name, "layer": layers, "score": found.scores, "rank": found.ranks}
        frames.append(pd.DataFrame(columns))
    table = pd.concat(frames, ignore_index=True)
    table.attrs = {"size": request.size, "protect": protect}
    return table


def leave_one_out(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
) -> pd.DataFrame:
    """Loss of every sequence without each single block, and of the whole model.

    Returns:
        layer (-1 is the whole model), sequence, loss (mean over the sequence's targets, nats), tokens (the
        number of its targets): weight by tokens to average over sequences.

    Raises:
        InputError: Bad tokens, or a loss that is not finite.
    """
    request = make_request(model, batch, attention_mask, batch_size=batch_size)
    return gather(request, {"left_out"}).losses
