"""Any one-shot criterion made iterative: remove a few, score what is left, repeat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from preln.base.errors import InputError
from preln.models import view
from preln.prune.evidence import Request, gather
from preln.prune.registry import Criterion, Ranked

_GREEDY = ("sleb",)


def source_for(criterion: Criterion, request: Request) -> object:
    """What a criterion's function takes: evidence from passes of its own, or the request."""
    return gather(request, criterion.needs) if criterion.shared else request


def removal_order(rounds: list[dict[int, float]], chosen: list[list[int]], spared: frozenset[int]) -> Ranked:
    """Scores and order from rounds of scoring and removing.

    What was removed comes first, by round. Its score is that of its round, or the largest score before it
    where that is larger, so that scores rise with ranks. Then come those left over, by their scores of the
    last round (never below those of the removed), and last what was spared, with the largest score.

    Args:
        rounds: Scores of the candidates in every round, by number.
        chosen: Who went in every round, first to go first.
        spared: Who may not go.
    """
    last = rounds[-1]
    gone = [item for group in chosen for item in group]
    rest = [item for item in last if item not in gone and item not in spared]
    rest.sort(key=lambda item: (last[item], -item))
    order = [*gone, *rest, *sorted(spared, reverse=True)]
    raw = {item: rounds[i][item] for i, group in enumerate(chosen) for item in group}
    raw |= {item: last[item] for item in rest}
    values = [raw.get(item, -np.inf) for item in order]
    scores = np.empty(len(order))
    scores[order] = np.maximum.accumulate(values)
    return Ranked(scores, order)


def iterative(criterion: Criterion, step: int) -> Criterion:
    """``METRIC@k``: remove the k lowest blocks, score the model without them, repeat ("1:1:n" for k = 1).

    Raises:
        InputError: A criterion that is greedy by itself.
    """
    name = f"{criterion.name}@{step}"
    if criterion.name in _GREEDY:
        raise InputError(
            f"metric {name!r}: {criterion.name} removes one block at a time by itself: leave out @{step}"
        )

    def function(request: Request) -> Ranked:
        return _iterate(criterion, step, request)

    function.__doc__ = f"{criterion.name}, {step} at a time: scored anew after every removal."
    return Criterion(name, criterion.needs, function, shared=False)


def _iterate(criterion: Criterion, step: int, request: Request) -> Ranked:
    own = request.blocks
    kept = list(range(len(own)))
    rounds: list[dict[int, float]] = []
    chosen: list[list[int]] = []
    left = request.size
    while left:
        blocks = [own[i] for i in kept]
        now = replace(
            request,
            model=view(request.model, blocks),
            blocks=blocks,
            size=min(step, left),
            spared=frozenset(i for i, block in enumerate(kept) if block in request.spared),
        )
        found = criterion.rank(source_for(criterion, now))
        scores = {block: float(found.scores[i]) for i, block in enumerate(kept)}
        free = [kept[i] for i in found.order if kept[i] not in request.spared]
        rounds.append(scores)
        chosen.append(free[: now.size])
        kept = [block for block in kept if block not in chosen[-1]]
        left -= now.size
    return removal_order(rounds, chosen, request.spared)
