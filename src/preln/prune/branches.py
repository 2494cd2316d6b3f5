"""The attention and MLP halves of every block, and how far each moves the stream (LLM-Drop)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import Anatomy, Parts, Tracer
from preln.models.halves import KINDS, contributes_nothing
from preln.models.maps import capture_calls
from preln.models.residual import as_tokens, change
from preln.models.trial import Trial, returning
from preln.prune.evidence import Array
from preln.prune.greedy import Part, Stack
from preln.prune.iterative import removal_order
from preln.prune.registry import Ranked, lowest_first
from preln.prune.walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Half(Part):
    """One branch of one block, and the modules without whose output it is gone."""

    kind: str = ""
    parts: Parts = field(default_factory=Parts)
    placement: str = ""


def _ends(trial: Trial, parts: Parts, placement: str, kind: str) -> list[nn.Module]:
    """The modules to silence so that the branch contributes nothing; empty where none do."""
    if kind == "attention":
        choices = trial.ends(parts.attention, parts.attention_norm, parts.attention_norm_after)
    else:
        choices = trial.ends(parts.mlp, parts.mlp_norm, parts.mlp_norm_after)
    if placement == "post-ln":  # there the norm behind the branch is the stream's
        norms = (parts.attention_norm_after, parts.mlp_norm_after)
        choices = [c for c in choices if not any(m is n for m in c for n in norms)]
    for choice in choices:
        with returning(choice):
            if contributes_nothing(trial, parts, placement, kind):
                return choice
    return []


@torch.no_grad()
def find_halves(model: PreTrainedModel, found: Anatomy) -> list[Half]:
    """Every branch of every block, in order, once it is known how to silence it.

    Raises:
        InputError: A block of unknown placement, or a branch that cannot be silenced from outside.
    """
    table = next(found.embedding.parameters())
    ids = torch.arange(3, 11, device=table.device).remainder(table.shape[0])[None]
    width = model.config.get_text_config().hidden_size
    halves = []
    for index, call in enumerate(capture_calls(model, found, as_tokens(ids))):
        parts, placement = found.parts(index), found.placements[index]
        if placement == "unknown":
            raise InputError(f"block {index}: its norms sit as in no known block: score whole blocks instead")
        trial = Trial(found.blocks[index], call, width)
        for kind in KINDS:
            if (parts.attention if kind == "attention" else parts.mlp) is None:
                continue
            silenced = _ends(trial, parts, placement, kind)
            if not silenced:
                raise InputError(
                    f"block {index}: its {kind} branch cannot be silenced by itself: score whole blocks"
                )
            halves.append(Half(index, silenced, kind, parts, placement))
    return halves


def whole_blocks(halves: Sequence[Half]) -> list[frozenset[int]]:
    """Sets of halves without which a block hands its input on: not in Post-LN, whose norms stay."""
    groups: dict[int, list[int]] = {}
    for number, half in enumerate(halves):
        groups.setdefault(half.block, []).append(number)
    return [
        frozenset(numbers)
        for numbers in groups.values()
        if halves[numbers[0]].placement != "post-ln"
        and {halves[n].kind for n in numbers} == _kinds(halves[numbers[0]].parts)
    ]


def _kinds(parts: Parts) -> set[str]:
    return {k for k, m in zip(KINDS, (parts.attention, parts.mlp), strict=True) if m is not None}


def _pairs(walk: Walk, index: int, halves: Sequence[Half], silenced: list[nn.Module]) -> dict[str, Pair]:
    """The stream at the input of every half of a block, and the same plus what the half adds.

    Args:
        walk: A sequence batch.
        index: The block.
        halves: Its halves.
        silenced: Modules of those that are gone.
    """
    x, parts, placement = walk.states[index], halves[0].parts, halves[0].placement

    def run(also: Sequence[nn.Module], watched: Sequence[nn.Module | None] = ()) -> tuple[Tensor, Tracer]:
        tracer = Tracer([m for m in watched if m is not None])
        with returning([*silenced, *also]), tracer:
            return walk.through(x, [index]), tracer

    if placement == "parallel":
        return {
            half.kind: (x, run([m for o in halves if o is not half for m in o.silenced or ()])[0])
            for half in halves
        }
    if parts.attention is None or parts.mlp is None:
        return {halves[0].kind: (x, run([])[0])}
    first, last = parts.attention_norm_after, parts.mlp_norm_after
    if placement == "post-ln" and first is not None and last is not None:
        seen = run([], (first, last))[1].trace
        return {
            "attention": (x, seen.inputs[first].reshape(x.shape)),
            "mlp": (seen.outputs[first].reshape(x.shape), seen.inputs[last].reshape(x.shape)),
        }
    door = parts.mlp_norm or parts.mlp
    y, tracer = run([], (door,))
    middle = tracer.trace.inputs[door].reshape(x.shape)
    return {"attention": (x, middle), "mlp": (middle, y)}


def _gaps(stack: Stack, halves: Sequence[Half], every: Sequence[Half], start: int, sums: Array) -> None:
    """Fill in ``sums``: over tokens, ``1 - cos`` of every half in block ``start`` or behind it."""
    behind = [n for n, half in enumerate(halves) if half.block >= start and n not in stack.gone]
    sums[behind] = 0.0
    for walk in stack.walks:
        real = walk.part.real
        for index in sorted({halves[n].block for n in behind}):
            silenced = [m for n in stack.gone if halves[n].block == index for m in halves[n].silenced or ()]
            pairs = _pairs(walk, index, [h for h in every if h.block == index], silenced)
            for n in (n for n in behind if halves[n].block == index):
                before, after = pairs[halves[n].kind]
                gap = change(before, after).gap
                sums[n] += float(gap[real.to(gap.device)].sum(dtype=torch.float64))


@torch.no_grad()
def llm_drop(
    walks: list[Walk],
    every: Sequence[Half],
    kind: str,
    *,
    size: int,
    step: int | None,
    spared: frozenset[int],
) -> Ranked:
    """Mean over tokens of ``1 - cos(h, h + branch(h))``, h the stream at the half's own input.

    He et al. 2024, "What matters in transformers? Not all attention is needed": the branch includes its norm,
    and h is x[l] for attention and the stream between the halves for the MLP; in a parallel block it is x[l]
    for both; in Post-LN h + branch(h) is what the norm behind the branch takes in.

    Args:
        walks: The sequence batches; their states are used up where ``step`` is given.
        every: All halves of the model.
        kind: ``attention`` or ``mlp``: which of them to rank.
        size: How many go.
        step: How many go before the others are scored again; None scores once.
        spared: Blocks whose halves may not go.
    """
    halves = [half for half in every if half.kind == kind]
    stack = Stack(walks, halves, whole_blocks(halves))
    tokens = sum(int(walk.part.real.sum()) for walk in walks)
    sums = np.zeros(len(halves))
    kept = frozenset(n for n, half in enumerate(halves) if half.block in spared)
    rounds: list[dict[int, float]] = []
    chosen: list[list[int]] = []
    start = 0
    while True:
        _gaps(stack, halves, every, start, sums)
        if step is None:
            return Ranked(sums / tokens, lowest_first(sums))
        scores = {n: float(sums[n] / tokens) for n in range(len(halves)) if n not in stack.gone}
        free = sorted((n for n in scores if n not in kept), key=lambda n: (scores[n], -n))
        rounds.append(scores)
        chosen.append(free[: min(step, size - len(stack.gone))])
        if len(stack.gone) + len(chosen[-1]) == size:
            return removal_order(rounds, chosen, kept)
        stack.remove(chosen[-1])
        start = min(halves[n].block for n in chosen[-1])
