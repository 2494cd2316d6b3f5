"""Scores on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from preln.base.files import staged_directory, write_json, write_parquet
from preln.base.provenance import provenance
from preln.data import fingerprint
from preln.models import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_scores(
    table: pd.DataFrame,
    model: PreTrainedModel,
    tokens: Tensor,
    out: str | os.PathLike[str],
    *,
    seed: int,
) -> Path:
    """Write ``scores.parquet`` and ``manifest.json`` (versions, hashes, seed, size, protection) into ``out``.

    Args:
        table: Table of :func:`preln.prune.score` or :func:`preln.prune.score_halves`.
        model: The model that was scored.
        tokens: The tokens that it was scored on.
        out: Folder to make.
        seed: Seed of the criteria that draw.

    Raises:
        InputError: ``out`` exists and is not empty, or cannot be written.
    """
    manifest = provenance(
        model={"sha256": model_fingerprint(model)},
        tokens={"sha256": fingerprint(tokens), "shape": list(tokens.shape)},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seed=seed,
        metrics=list(dict.fromkeys(table["metric"])),
        **{str(name): value for name, value in table.attrs.items()},
    )
    with staged_directory(out) as folder:
        write_parquet(folder / "scores.parquet", table)
        write_json(folder / "manifest.json", manifest)
    return Path(out)
