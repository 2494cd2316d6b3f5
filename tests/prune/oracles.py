"""Slow definitions: float64 NumPy on states, fresh models for every removal."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch

from preln.models import drop_blocks, find_blocks, token_losses
from preln.models.halves import silence_halves


def batch(n=3, t=8, seed=3):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


def column(frame, metric, name="score"):
    return frame[frame["metric"] == metric][name].to_numpy()


def order(frame, metric):
    return frame[frame["metric"] == metric].sort_values("rank")["layer"].tolist()


@torch.no_grad()
def stream(model, ids):
    """x[0] … x[L], each [n, t, d] in float64, by hooks of its own."""
    seen, handles = [], []
    blocks = find_blocks(model)[1]
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda m, a, k: seen.append((*a, *k.values())[0]), with_kwargs=True
            )
        )
    handles.append(
        blocks[-1].register_forward_hook(
            lambda m, a, o: seen.append(o if isinstance(o, torch.Tensor) else o[0])
        )
    )
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [x.double().numpy() for x in seen]


def angle(x, y):
    a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1)) / np.pi


def loss(model, ids):
    losses, mask = token_losses(model, ids)
    return float(losses[mask].double().mean())


def greedy_blocks(model, ids, size, spared=()):
    """SLEB with a new model for every candidate: order of removal and loss of every round."""
    count, gone, rounds = len(find_blocks(model)[1]), [], []
    for _ in range(size):
        costs = {
            k: loss(drop_blocks(model, [*gone, k]), ids) for k in range(count) if k not in (*gone, *spared)
        }
        gone.append(min(costs, key=lambda k: (costs[k], -k)))
        rounds.append(costs)
    return gone, rounds


def without_halves(model, halves):
    """A copy with the last linear maps of some halves set to zero."""
    small = copy.deepcopy(model)
    if halves:
        silence_halves(small, halves)
    return small


@torch.no_grad()
def greedy_halves(model, ids, size, distance, spared=()):
    """FinerCut with a copy whose weights are zeroed for every candidate."""
    whole = model(input_ids=ids, use_cache=False).logits.double()
    every = [(k, kind) for k in range(len(find_blocks(model)[1])) for kind in ("attention", "mlp")]
    gone, costs = [], {}
    for _ in range(size):
        costs = {
            h: float(
                distance(
                    whole, without_halves(model, [*gone, h])(input_ids=ids, use_cache=False).logits.double()
                ).mean()
            )
            for h in every
            if h not in gone and h[0] not in spared
        }
        gone.append(min(costs, key=lambda h: (costs[h], [-i for i in (every.index(h),)])))
    return gone, costs


def windows(states, size, tokens=slice(None)):
    """Mean angle across every window of blocks, at some tokens."""
    return np.array(
        [angle(x[:, tokens], y[:, tokens]).mean() for x, y in zip(states, states[size:], strict=False)]
    )


def sums(states, size, tokens):
    """Sum of the mean adjacent angles of every window."""
    steps = np.array([angle(x[:, tokens], y[:, tokens]).mean() for x, y in itertools.pairwise(states)])
    return np.array([steps[i : i + size].sum() for i in range(len(steps) - size + 1)])
