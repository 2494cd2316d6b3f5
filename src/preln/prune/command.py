"""From what a user asks for to a plan, and scores on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.base.files import staged_directory, write_json, write_parquet
from preln.base.provenance import provenance
from preln.data import fingerprint
from preln.models import find_blocks, model_fingerprint
from preln.prune.criteria import CRITERIA
from preln.prune.plan import Plan, make_plan, parse_layers, plan_layers, protected_blocks, read_plan
from preln.prune.scores import choose_metrics, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_for(
    model: PreTrainedModel,
    tokens: Callable[[], Tensor],
    *,
    name: str,
    metric: str | None = None,
    drop: int | None = None,
    layers: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    protect: str = "none",
    seed: int = 0,
) -> Plan:
    """The plan for exactly one of: a metric with a number of blocks, blocks by hand, or a stored plan.

    What can be refused without measuring is refused before ``tokens`` are read.

    Args:
        model: The model to cut.
        tokens: Gives the calibration tokens; called only if a metric chooses.
        name: What to call the model in the plan.
        metric: Criterion that chooses.
        drop: How many blocks it removes.
        layers: Blocks as in ``3,4,20-23``; ranges are half-open.
        plan: A stored plan.
        protect: Protection preset.
        seed: For criteria that draw.

    Raises:
        InputError: None or several ways at once, or blocks that make no sense.
    """
    ways = [metric is not None or drop is not None, layers is not None, plan is not None]
    if sum(ways) != 1:
        raise InputError("name the blocks in one way: --metric with --drop, or --layers, or --plan")
    count = len(find_blocks(model)[1])
    spared = protected_blocks(protect, count)
    if plan is not None:
        found = read_plan(plan)
        if found.num_blocks != count:
            raise InputError(f"{plan}: made for {found.num_blocks} blocks, but this model has {count}")
        return found
    if layers is not None:
        return plan_layers(parse_layers(layers), count, protect=protect, model=name)
    if metric is None or drop is None:
        missing = "--metric" if metric is None else "--drop"
        raise InputError(f"{missing} is missing: --metric and --drop go together")
    choose_metrics([metric])
    if not 1 <= drop < count:
        raise InputError(f"--drop {drop} of {count} blocks: remove at least 1 and keep at least 1")
    if drop > count - len(spared):
        raise InputError(f"--drop {drop}: --protect {protect} leaves only {count - len(spared)} to remove")
    if not CRITERIA[metric].needs:  # reverse order, a random one, magnitudes: no text plays a part
        scores = score(model, torch.zeros(1, 2, dtype=torch.long), [metric], seed=seed)
        return make_plan(scores, metric, drop=drop, protect=protect, model=name)
    batch = tokens()
    scores = score(model, batch, [metric], seed=seed)
    return make_plan(scores, metric, drop=drop, protect=protect, tokens=fingerprint(batch), model=name)


def write_scores(
    table: pd.DataFrame,
    model: PreTrainedModel,
    tokens: Tensor,
    out: str | os.PathLike[str],
    *,
    seed: int,
) -> Path:
    """Write ``scores.parquet`` and ``manifest.json`` (versions, hashes, seed) into ``out``.

    Raises:
        InputError: ``out`` exists and is not empty, or cannot be written.
    """
    manifest = provenance(
        model={"sha256": model_fingerprint(model)},
        tokens={"sha256": fingerprint(tokens), "shape": list(tokens.shape)},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seed=seed,
        metrics=list(dict.fromkeys(table["metric"])),
    )
    with staged_directory(out) as folder:
        write_parquet(folder / "scores.parquet", table)
        write_json(folder / "manifest.json", manifest)
    return Path(out)
