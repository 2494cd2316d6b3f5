"""Training one model of a placement study: all placements of a seed take the same tokens in one order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from preln.base.checkpoints import Checkpoints
from preln.data import fingerprint
from preln.experiment.placement.study import Training
from preln.heal.training.checkpoint import optimizer_tensors, restore_optimizer
from preln.models.loss import losses_from_logits, token_losses

FLOOR = 0.1  # the share of the highest rate at which the decay ends


@dataclass
class Trained:
    """What training left.

    Attributes:
        history: Rows step, tokens, split, loss, learning_rate, gradient_norm (before clipping).
        diverged_at: The first step whose loss was not finite, where training stopped; None if none was.
        tokens: Tokens seen.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    diverged_at: int | None = None
    tokens: int = 0

    def table(self) -> pd.DataFrame:
        """The history as a table."""
        return pd.DataFrame(self.history)


def rate_at(step: int, schedule: Training) -> float:
    """The learning rate of update ``step``, counted from 0: up in a line, down along a cosine to a tenth.

    >>> schedule = Training(steps=101, batch_size=1, learning_rate=1.0, warmup_steps=10)
    >>> rate_at(0, schedule), rate_at(9, schedule), round(rate_at(100, schedule), 6)
    (0.1, 1.0, 0.1)
    """
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    left = max(schedule.steps - 1 - schedule.warmup_steps, 1)
    done = min((step - schedule.warmup_steps) / left, 1.0)
    return schedule.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def rows_at(step: int, batch_size: int, count: int, seed: int) -> Int[np.ndarray, " b"]:
    """Which of ``count`` windows update ``step`` takes: pass after pass, each in an order of its own.

    A function of its arguments alone, so a run that continues takes what an undisturbed one would, and models
    of every placement take the same.

    >>> rows = np.concatenate([rows_at(step, 4, 8, seed=0) for step in range(2)])
    >>> sorted(rows.tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng((seed, int(e))).permutation(count) for e in np.unique(places // count)}
    return np.array([orders[place // count][place % count] for place in places])


def train(
    model: Any,
    tokens: Int[Tensor, "n t"],
    validation: Int[Tensor, "m t"],
    schedule: Training,
    *,
    seed: int,
    directory: Path,
) -> Trained:
    """Train a model in place; a killed run continues from ``directory`` to the same numbers.

    Args:
        model: A causal model; left in evaluation mode.
        tokens: Training windows.
        validation: Windows of other documents; their loss is taken every ``eval_every`` updates, and last.
        schedule: Updates, batch, rates.
        seed: Fixes the order of the windows.
        directory: Folder of checkpoints.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=True)
    identity = {
        "schedule": schedule.model_dump(exclude={"checkpoint_every"}),
        "seed": seed,
        "model": str(model.config.to_dict()),
        "data": [fingerprint(tokens), fingerprint(validation)],
    }
    checkpoints, trained, start = Checkpoints(directory, identity), Trained(), 0
    if (stored := checkpoints.latest()) is not None:
        progress, kept = stored
        start, trained = progress["step"], Trained(progress["history"], tokens=progress["tokens"])
        model.load_state_dict(kept["weights"], strict=True)
        restore_optimizer(optimizer, named, kept["optimizer"])
    model.train()
    for step in range(start, schedule.steps):
        rate = rate_at(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = rows_at(step, schedule.batch_size, len(tokens), seed)
        ids = tokens[torch.from_numpy(rows)].to(next(model.parameters()).device)
        loss = losses_from_logits(model(input_ids=ids).logits, ids).mean()
        if not bool(torch.isfinite(loss)):
            trained.diverged_at = step + 1
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        size = nn.utils.clip_grad_norm_(named.values(), schedule.clip)
        optimizer.step()
        trained.tokens += ids.numel()
        row = {"step": step + 1, "tokens": trained.tokens, "split": "train", "loss": loss.item()}
        trained.history.append(row | {"learning_rate": rate, "gradient_norm": size.item()})
        last = step + 1 == schedule.steps
        if last or (step + 1) % schedule.eval_every == 0:
            held = held_out_loss(model, validation)
            trained.history.append(row | {"split": "validation", "loss": held, "learning_rate": rate})
            model.train()
        if not last and (step + 1) % schedule.checkpoint_every == 0:
            progress = {"step": step + 1, "history": trained.history, "tokens": trained.tokens}
            weights = {name: value.detach() for name, value in model.state_dict().items()}
            checkpoints.save(
                step + 1, progress, {"weights": weights, "optimizer": optimizer_tensors(optimizer, named)}
            )
    model.eval()
    return trained


def held_out_loss(model: Any, tokens: Int[Tensor, "n t"]) -> float:
    """Mean next-token loss in nats; not finite where the model is broken."""
    losses, mask = token_losses(model, tokens, batch_size=32)
    return float(losses[mask].double().mean())


def baselines(
    tokens: Int[Tensor, "n t"], validation: Int[Tensor, "m t"], vocabulary: int
) -> dict[str, float]:
    """Losses of counting, in nats, on the targets of ``validation``: what a model must beat.

    ``p(b) = (c(b) + 1) / (n + V)`` of the tokens, and ``p(b | a) = (c(a, b) + k p(b)) / (c(a) + k)`` with
    k = 5 (MacKay and Peto 1995) of pairs inside windows.

    >>> even = torch.tensor([[0, 1, 0, 1]])
    >>> {name: round(value, 2) for name, value in baselines(even, even, 2).items()}
    {'unigram': 0.69, 'bigram': 0.48}
    """
    single = np.bincount(tokens.flatten().numpy(), minlength=vocabulary).astype(np.float64)
    p = (single + 1.0) / (single.sum() + vocabulary)
    code = tokens[:, :-1] * vocabulary + tokens[:, 1:]
    pairs = np.bincount(code.flatten().numpy(), minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    conditional = (pairs + 5.0 * p) / (pairs.sum(axis=1, keepdims=True) + 5.0)
    a, b = validation[:, :-1].flatten().numpy(), validation[:, 1:].flatten().numpy()
    return {"unigram": float(-np.log(p[b]).mean()), "bigram": float(-np.log(conditional[a, b]).mean())}
