"""Scores of every block under any criteria, on the same tokens, from shared passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.models.residual import as_tokens
from preln.prune.criteria import CRITERIA
from preln.prune.evidence import gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_metrics(metrics: str | Iterable[str]) -> list[str]:
    """Names of criteria, ``"all"`` or a comma-separated string resolved.

    Raises:
        InputError: A name that is not registered, or none at all.

    >>> choose_metrics("reverse,random")
    ['reverse', 'random']
    """
    if isinstance(metrics, str):
        metrics = list(CRITERIA) if metrics == "all" else [m.strip() for m in metrics.split(",")]
    names = list(dict.fromkeys(metrics))
    unknown = [name for name in names if name not in CRITERIA]
    if unknown:
        raise InputError(f"metric {unknown[0]!r} is unknown: choose from {', '.join(CRITERIA)}, or all")
    if not names:
        raise InputError("no metric named: name at least one, or all")
    return names


def ranks(scores: np.ndarray) -> np.ndarray:
    """Order of removal, 0 first: lowest score first, the deeper block first among equals.

    >>> ranks(np.array([0.5, 0.1, 0.1])).tolist()
    [2, 1, 0]
    """
    order = np.lexsort((-np.arange(len(scores)), scores))
    result = np.empty(len(scores), dtype=np.int64)
    result[order] = np.arange(len(scores))
    return result


def score(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    metrics: str | Iterable[str] = "all",
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """Importance of every block: metric, layer, score, rank (0 is removed first).

    Criteria share passes over the tokens (see :func:`preln.prune.evidence.gather`). The model is left as it
    was.

    Args:
        model: A causal model.
        batch: Calibration tokens; never the tokens that results are reported on.
        metrics: Names from :data:`preln.prune.CRITERIA`, comma-separated or as a list, or ``"all"``.
        attention_mask: 1 for real tokens; None if all are.
        batch_size: Sequences in one pass; no score depends on it.
        seed: For criteria that draw.

    Raises:
        InputError: Bad tokens, an unknown metric, or values that are not finite.
    """
    names, tokens = choose_metrics(metrics), as_tokens(batch, attention_mask)
    needs = frozenset().union(*(CRITERIA[name].needs for name in names))
    evidence = gather(model, tokens, needs, batch_size=batch_size, seed=seed)
    frames = []
    for name in names:
        values = CRITERIA[name].function(evidence)
        if not np.isfinite(values).all():
            raise InputError(f"{name}: block {int(np.argmin(np.isfinite(values)))} has no finite score")
        columns = {"metric": name, "layer": np.arange(len(values)), "score": values, "rank": ranks(values)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


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
    tokens = as_tokens(batch, attention_mask)
    return gather(model, tokens, {"left_out"}, batch_size=batch_size).losses
