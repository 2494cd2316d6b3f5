"""Scores of attention and MLP halves: LLM-Drop and FinerCut."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from preln.base.errors import InputError
from preln.models import anatomy
from preln.models.residual import undisturbed
from preln.models.tail import Tail
from preln.prune.angles import angles
from preln.prune.branches import Half, find_halves, llm_drop, whole_blocks
from preln.prune.evidence import Request
from preln.prune.greedy import Stack, remove_greedily
from preln.prune.registry import HALF_METRICS, Ranked, choose_metrics, shared_metrics, split_names
from preln.prune.scores import how_many, make_request, score
from preln.prune.walk import Walk, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits = Float[Tensor, "n v"]
Distance = Callable[[Logits, Logits], Tensor]


def jensen_shannon(a: Logits, b: Logits) -> Float[Tensor, " n"]:
    """``(KL(p|m) + KL(q|m)) / 2`` with ``m = (p + q)/2``, in nats: 0 for equal logits, at most log 2.

    Public FinerCut code hands its arguments to ``kl_div`` the other way round, and gets KL(m|p) and KL(m|q).
    """
    p, q = (x.float().log_softmax(dim=-1) for x in (a, b))
    m = torch.logaddexp(p, q) - math.log(2.0)
    return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))


def euclidean(a: Logits, b: Logits) -> Float[Tensor, " n"]:
    """``|a - b|``."""
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1)


DISTANCES: dict[str, Distance] = {
    "finercut": jensen_shannon,
    "finercut_euclidean": euclidean,
    "finercut_angular": angles,
}


def choose_half_metrics(metrics: str | Iterable[str]) -> list[tuple[str, str, int | None]]:
    """Name, criterion and step (or None) of every metric over halves; ``"all"`` are the one-shot ones.

    Raises:
        InputError: A name that is none of :data:`preln.prune.HALF_METRICS`, or none at all.
    """
    chosen = []
    for name in split_names(metrics, [m for m in HALF_METRICS if m not in DISTANCES]):
        match = re.fullmatch(r"(\w+?)(?:@([1-9]\d*))?", name, flags=re.ASCII)
        if match is None or match[1] not in HALF_METRICS:
            known = ", ".join(HALF_METRICS)
            raise InputError(f"metric {name!r} ranks no halves: choose from {known}, or llm_drop_attention@k")
        if match[2] and match[1] in DISTANCES:
            raise InputError(f"metric {name!r}: {match[1]} removes one half at a time: leave out @{match[2]}")
        chosen.append((name, match[1], int(match[2]) if match[2] else None))
    return chosen


def score_halves(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    metrics: str | Iterable[str] = "all",
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
    size: int | None = None,
    protect: str = "none",
) -> pd.DataFrame:
    """Importance of every attention or MLP half: metric, layer, half, score, rank (0 is removed first).

    - ``llm_drop_attention``, ``llm_drop_mlp``: mean over tokens of ``1 - cos(h, h + branch(h))`` at the
      half's own input, over the halves of that kind; ``…@k`` removes k at a time and scores the rest again.
    - ``finercut``: greedy over all halves: remove the one whose removal moves the output distribution least,
      measured against the whole model's by the mean Jensen-Shannon divergence over tokens, score again,
      repeat (Zhang et al. 2024); ``finercut_euclidean``, ``finercut_angular``: the same by the distance or
      angle of the logits. The paper's protection of the front is ``protect="finercut"``.

    Scores of greedy and iterative criteria are those of the round in which a half went (or the largest so
    far, where that is larger); halves left over follow with their scores of the last round, protected ones
    come last. ``"all"`` means the two one-shot criteria.

    Args:
        model: A causal model; left as it was.
        batch: Calibration tokens.
        metrics: Names from :data:`preln.prune.HALF_METRICS`, comma-separated or as a list, or ``"all"``.
        attention_mask: 1 for real tokens; None if all are.
        batch_size: Sequences in one pass; no score depends on it.
        size: How many halves are to go (default: a quarter of those that the metric ranks).
        protect: Preset of blocks whose halves may not go; one-shot criteria score them all the same.

    Raises:
        InputError: Bad tokens, an unknown metric, blocks of unknown placement, or values that are not finite.
    """
    names = choose_half_metrics(metrics)
    request = make_request(model, batch, attention_mask, batch_size=batch_size, protect=protect)
    frames = []
    with undisturbed(model), torch.no_grad():
        halves = find_halves(model, anatomy(model))
        walks = [walk(model, request.blocks, part) for part in request.parts()]
        for name, base, step in names:
            ranked = [h for h in halves if base in DISTANCES or base == f"llm_drop_{h.kind}"]
            if not ranked:
                raise InputError(f"{name}: this model has no such halves: score whole blocks instead")
            free = sum(half.block not in request.spared for half in ranked)
            count = min(how_many(size, len(ranked), "halves"), free if size is None else len(ranked))
            if not 1 <= count <= free:
                raise InputError(f"{name}: protection leaves {free} halves to remove: protect less")
            # states are lists of tensors that removals replace: every metric starts from the whole model's
            fresh = [Walk(w.part, w.blocks, w.calls, list(w.states)) for w in walks]
            if base in DISTANCES:
                found = _finercut(request, fresh, halves, base, count)
            else:
                kind = base.removeprefix("llm_drop_")
                found = llm_drop(fresh, halves, kind, size=count, step=step, spared=request.spared)
            columns = {
                "metric": name,
                "layer": [half.block for half in ranked],
                "half": [half.kind for half in ranked],
                "score": found.scores,
                "rank": found.ranks,
            }
            frames.append(pd.DataFrame(columns))
    table = pd.concat(frames, ignore_index=True)
    table.attrs = {"size": size, "protect": protect}
    return table


def score_any(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    metrics: str | Sequence[str] = "all",
    *,
    seed: int = 0,
    size: int | None = None,
    protect: str = "none",
) -> pd.DataFrame:
    """Scores under criteria over blocks and over halves: the table of :func:`preln.prune.score`.

    With a criterion over halves it has a column ``half`` more, which says ``block`` for the other ones.

    Raises:
        InputError: See :func:`preln.prune.score` and :func:`preln.prune.score_halves`.
    """
    names = split_names(metrics, shared_metrics())
    halves = [name for name in names if name.partition("@")[0] in HALF_METRICS]
    blocks = [name for name in names if name not in halves]
    if blocks:
        choose_metrics(blocks)
    if not halves:
        return score(model, batch, blocks, seed=seed, size=size, protect=protect)
    by_half = score_halves(model, batch, halves, size=size, protect=protect)
    if not blocks:
        return by_half
    by_block = score(model, batch, blocks, seed=seed, size=size, protect=protect)
    table = pd.concat([by_block.assign(half="block"), by_half], ignore_index=True)
    table.attrs = by_block.attrs
    return table.loc[:, ["metric", "layer", "half", "score", "rank"]]


def _finercut(request: Request, walks: list[Walk], halves: list[Half], name: str, size: int) -> Ranked:
    """Greedy removal by the distance of the output from the whole model's."""
    tail, distance = Tail(request.model, block=request.blocks[0]), DISTANCES[name]
    whole = {id(each): each.states[-1] for each in walks}

    def cost(each: Walk, finals: Iterator[Tensor]) -> np.ndarray:
        real = each.part.real
        ids = each.part.ids[real]
        pick = real.to(each.states[-1].device)
        others = [final[pick] for final in finals]

        def compare(logits: Tensor, rows: slice) -> Tensor:
            return torch.stack([distance(logits, tail.logits(o[rows], ids[rows])) for o in others], dim=1)

        # the whole model's logits are made once a chunk, whatever the number of candidates
        return tail.reduce(whole[id(each)][pick], ids, compare).sum(0, dtype=torch.float64).cpu().numpy()

    spared = frozenset(n for n, half in enumerate(halves) if half.block in request.spared)
    stack = Stack(walks, halves, whole_blocks(halves))
    total = int(request.tokens.real.sum())
    return remove_greedily(stack, size, spared, cost, total=total, label=name)
