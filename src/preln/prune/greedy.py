"""Greedy removal: try every candidate, remove the cheapest, try again from what has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.base.journal import next_stage
from preln.base.progress import track
from preln.models.residual import undisturbed
from preln.models.tail import Tail
from preln.models.trial import returning
from preln.prune.evidence import Request
from preln.prune.iterative import removal_order
from preln.prune.registry import Ranked, criterion
from preln.prune.walk import Walk, walk

# summed cost of every candidate on one sequence batch, from the states x[L] that it leads to
Cost = Callable[[Walk, Iterator[Tensor]], Iterable[float]]


@dataclass(frozen=True)
class Part:
    """Something that can go.

    Attributes:
        block: The block that it is, or lies in.
        silenced: The modules to silence (a branch), or None for the whole block.
    """

    block: int
    silenced: Sequence[nn.Module] | None = None


@dataclass
class Stack:
    """The blocks without some parts, on every sequence batch, with the present states between them.

    Attributes:
        walks: One a sequence batch; their states are those of the present stack.
        parts: What can go.
        skip: Sets of parts that together are a whole block, which is then not run at all.
        gone: Numbers of the parts that are gone.
    """

    walks: list[Walk]
    parts: Sequence[Part]
    skip: Sequence[frozenset[int]] = ()
    gone: frozenset[int] = field(default_factory=frozenset)

    def behind(self, walk: Walk, start: int, gone: frozenset[int]) -> Iterator[Tensor]:
        """The states behind block ``start`` and every later one, without the parts ``gone``."""
        state = walk.states[start]
        for index in range(start, len(walk.blocks)):
            state = self.behind_one(walk, index, state, gone)
            yield state

    def behind_one(self, walk: Walk, index: int, state: Tensor, gone: Iterable[int]) -> Tensor:
        """The state behind one block, without those of the parts ``gone`` that lie in it."""
        here = [number for number in gone if self.parts[number].block == index]
        if any(self.parts[number].silenced is None for number in here):
            return state
        if any(group <= set(here) for group in self.skip):
            return state
        silenced = [m for number in here for m in self.parts[number].silenced or ()]
        with returning(silenced) if silenced else nullcontext():
            return walk.through(state, [index])

    def without(self, walk: Walk, number: int) -> Tensor:
        """x[L] without one more part; what lies in front of it is not run again."""
        *_, final = self.behind(walk, self.parts[number].block, self.gone | {number})
        return final

    def remove(self, numbers: Sequence[int]) -> None:
        """Let parts go for good; only states behind the first of them are computed anew."""
        self.gone = self.gone | set(numbers)
        start = min(self.parts[number].block for number in numbers)
        for each in self.walks:
            each.states[start + 1 :] = list(self.behind(each, start, self.gone))


@torch.no_grad()
def remove_greedily(
    stack: Stack, size: int, spared: frozenset[int], cost: Cost, *, total: float, label: str
) -> Ranked:
    """Remove the part of least cost, ``size`` times; the deeper one among equals.

    Memory: the states of all sequence batches, ``(L + 1) n t d`` numbers. Within a journal it is one stage.

    Args:
        stack: The whole stack at first.
        size: How many parts go.
        spared: Numbers of those that may not go.
        cost: Of candidates, summed over one sequence batch.
        total: What to divide summed costs by.
        label: Of the progress bar, and in errors.

    Raises:
        InputError: More parts to go than may, or a cost that is not finite.
    """
    rounds: list[dict[int, float]] = []
    chosen: list[list[int]] = []
    free = [number for number in range(len(stack.parts)) if number not in spared]
    if size > len(free):
        raise InputError(f"{label}: {size} are to go and protection leaves {len(free)}: remove fewer")
    stage = next_stage(label)
    stored = stage.restore()
    if stored is not None:
        rounds = [{int(number): cost for number, cost in each} for each in stored[0]["rounds"]]
        chosen = [[number] for number in stored[0]["chosen"]]
        if len(chosen) < size:
            stack.remove(stored[0]["chosen"])
    for _ in track(range(len(chosen), size), label=label, total=size - len(chosen)):
        candidates = [number for number in free if number not in stack.gone]
        sums = np.zeros(len(candidates))
        for each in stack.walks:
            finals = (stack.without(each, number) for number in candidates)
            sums += np.fromiter(cost(each, finals), dtype=np.float64, count=len(candidates))
        costs = dict(zip(candidates, (sums / total).tolist(), strict=True))
        bad = [number for number, value in costs.items() if not np.isfinite(value)]
        if bad:
            where = f"without block {stack.parts[bad[0]].block}"
            raise InputError(f"{label}: {where} the outcome is not finite: check the weights, or the --dtype")
        best = min(candidates, key=lambda number: (costs[number], -number))
        rounds.append(costs)
        chosen.append([best])
        if len(chosen) < size:
            stack.remove([best])
        stage.save(len(chosen), lambda: (_told(rounds, chosen), {}), last=len(chosen) == size)
    return removal_order(rounds, chosen, spared)


def _told(rounds: list[dict[int, float]], chosen: list[list[int]]) -> dict[str, object]:
    """Costs and choices of every round, as JSON has them."""
    return {"rounds": [list(costs.items()) for costs in rounds], "chosen": [n for (n,) in chosen]}


@criterion("sleb", "left_out", shared=False)
def sleb(request: Request) -> Ranked:
    """Greedy: remove the block whose removal costs least loss, score again, repeat (Song et al. 2024, SLEB).

    The score of a removed block is the mean loss once it is gone (the largest so far, where a later removal
    costs less); that of a block left over, the loss that its removal would have cost in the last round. A
    block that another one follows is run again only where something in front of it has changed. The paper
    protects the first and the last block: that is ``protect="sleb"``.
    """
    blocks = request.blocks
    with undisturbed(request.model):
        tail = Tail(request.model, block=request.blocks[0])
        walks = [walk(request.model, blocks, part) for part in request.parts()]
        stack = Stack(walks, [Part(index) for index in range(len(blocks))])

        def losses(each: Walk, finals: Iterator[Tensor]) -> Iterator[float]:
            for final in finals:
                yield float(tail.losses(final, each.part).sum(dtype=torch.float64))

        total = int(request.tokens.targets.sum())
        return remove_greedily(stack, request.size, request.spared, losses, total=total, label="sleb")
