"""The loss without each of many sets of blocks and halves: what the sets have in common is run once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.journal import next_stage
from preln.base.progress import track
from preln.models import anatomy
from preln.models.layers import sort_halves
from preln.models.residual import undisturbed
from preln.models.tail import Tail
from preln.prune.branches import Half, find_halves, whole_blocks
from preln.prune.greedy import Part, Stack
from preln.prune.scores import make_request
from preln.prune.walk import Walk, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Removal = frozenset[int]  # numbers of the parts that are gone


@torch.no_grad()
def removal_losses(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    removals: Mapping[str, Iterable[int | str]],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
) -> pd.DataFrame:
    """Loss of every sequence without the blocks, and halves of blocks, of every removal.

    Sets that agree on the blocks up to l share their states up to x[l], and equal sets everything. So all
    single blocks cost what :func:`preln.prune.leave_one_out` costs, all reverse depths one pass and a head
    each. At most 2 (L + 1) states of a sequence batch are kept.

    Args:
        model: A causal model; left as it was.
        batch: Tokens.
        removals: By name, blocks as numbers and halves as ``"5a"`` (attention), ``"6m"`` (MLP); an empty
            removal is the whole model.
        attention_mask: 1 for real tokens; None if all are.
        batch_size: Sequences in one pass; no loss depends on it.

    Returns:
        name, sequence, loss (mean over the sequence's targets, nats), tokens (the number of its targets).

    Raises:
        InputError: Bad tokens or removals, or a loss that is not finite, naming the removal.
    """
    request = make_request(model, batch, attention_mask, batch_size=batch_size)
    with undisturbed(model):
        parts, groups = _parts(model, request.blocks, removals)
        sets = {name: _numbers(name, gone, parts, len(request.blocks)) for name, gone in removals.items()}
        tail = Tail(model, block=request.blocks[0])
        found: dict[str, list[Tensor]] = {name: [] for name in sets}
        batches, stage = request.parts(), next_stage("removals")
        stored = stage.restore()
        done = 0 if stored is None else stored[0]["done"]
        if stored is not None:
            found = {name: [stored[1]["losses"][str(n)]] for n, name in enumerate(sets)}
        for part in track(batches[done:], label="removals", total=len(batches) - done):
            stack = Stack([walk(model, request.blocks, part)], parts, groups)
            losses: dict[Removal, Tensor] = {}
            _descend(stack, tail, 0, stack.walks[0].states[0], sorted(set(sets.values()), key=sorted), losses)
            for name, gone in sets.items():
                if not bool(torch.isfinite(losses[gone]).all()):
                    raise InputError(f"without {name}: the loss is not finite: check the weights or --dtype")
                found[name].append(losses[gone])
            done += 1
            stage.save(done, partial(_told, done, found), last=done == len(batches))
    counts = request.tokens.targets.sum(1).cpu()
    means = torch.stack([torch.cat(sums) for sums in found.values()]).double() / counts
    return pd.DataFrame(
        {
            "name": np.repeat(list(found), len(counts)),
            "sequence": np.tile(np.arange(len(counts)), len(found)),
            "loss": means.flatten().numpy(),
            "tokens": counts.repeat(len(found)).numpy(),
        }
    )


def _told(
    done: int, found: Mapping[str, list[Tensor]]
) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
    """How many sequence batches are done, and the losses of their sequences without every set."""
    return {"done": done}, {"losses": {str(n): torch.cat(parts) for n, parts in enumerate(found.values())}}


def _parts(
    model: PreTrainedModel, blocks: list, removals: Mapping[str, Iterable[int | str]]
) -> tuple[list[Part], list[frozenset[int]]]:
    """Everything that a removal can name, and the sets of halves that make up a whole block."""
    whole: list[Part] = [Part(index) for index in range(len(blocks))]
    if not any(isinstance(entry, str) for gone in removals.values() for entry in gone):
        return whole, []
    halves = find_halves(model, anatomy(model))
    return [*whole, *halves], [frozenset(n + len(blocks) for n in group) for group in whole_blocks(halves)]


def _numbers(name: str, gone: Iterable[int | str], parts: list[Part], count: int) -> Removal:
    """The numbers of the parts that a removal names.

    Raises:
        InputError: A block or half that the model does not have.
    """
    named = sort_halves(gone)
    outside = [block for blocks in named.values() for block in blocks if not 0 <= block < count]
    if outside:
        raise InputError(f"{name}: block {outside[0]} is out of range: there are blocks 0 to {count - 1}")
    numbers = set(named["drop"])
    places = {(p.block, p.kind): n for n, p in enumerate(parts) if isinstance(p, Half)}
    for kind in ("attention", "mlp"):
        for block in named[f"drop_{kind}"]:
            if (block, kind) not in places:
                raise InputError(f"{name}: block {block} has no {kind} half")
            numbers.add(places[block, kind])
    return frozenset(numbers)


def _descend(
    stack: Stack, tail: Tail, start: int, state: Tensor, sets: list[Removal], found: dict[Removal, Tensor]
) -> None:
    """Summed losses of the sequences for every set; all ``sets`` have led to the same x[start]."""
    each: Walk = stack.walks[0]
    if start == len(each.blocks):
        losses = tail.losses(state, each.part).sum(1).cpu()
        found.update(dict.fromkeys(sets, losses))
        return
    here = {n for n, part in enumerate(stack.parts) if part.block == start}
    ways: dict[Removal, list[Removal]] = {}
    for gone in sets:
        ways.setdefault(frozenset(gone & here), []).append(gone)
    for way, followers in ways.items():
        if not way and state is each.states[start]:  # nothing in front is gone: the walk has been here
            behind = each.states[start + 1]
        else:
            behind = stack.behind_one(each, start, state, way)
        _descend(stack, tail, start + 1, behind, followers, found)
