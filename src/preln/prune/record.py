"""Scores on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    extra: Mapping[str, pd.DataFrame] | None = None,
    **facts: Any,
) -> Path:
    """Write ``scores.parquet`` and ``manifest.json`` (versions, hashes, seed, size, protection) into ``out``.

    Args:
        table: Table of :func:`preln.prune.score` or :func:`preln.prune.score_halves`.
        model: The model that was scored.
        tokens: The tokens that it was scored on.
        out: Folder to make.
        seed: Seed of the criteria that draw.
        extra: More tables, by the name of their file.
        facts: More entries of the manifest.

    Raises:
        InputError: ``out`` exists and is not empty, or cannot be written.
    """
    manifest = provenance(
        model={"sha256": model_fingerprint(model)},
        tokens={"sha256": fingerprint(tokens), "shape": list(tokens.shape)},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seed=seed,
        metrics=_metrics(table),
        **{str(name): value for name, value in table.attrs.items()},
        **facts,
    )
    with staged_directory(out, checksums=True) as folder:
        for name, each in {"scores": table, **(extra or {})}.items():
            write_parquet(folder / f"{name}.parquet", each)
        write_json(folder / "manifest.json", manifest)
    return Path(out)


def orders(table: pd.DataFrame) -> dict[str, list[Any]]:
    """By metric, blocks (or halves, as ``5a``, ``6m``) in the order in which they go."""
    halves = table["half"] if "half" in table else pd.Series("block", index=table.index)
    names = [
        layer if half == "block" else f"{layer}{half[0]}"
        for layer, half in zip(table["layer"].tolist(), halves, strict=True)
    ]
    named = table.assign(part=names).sort_values(by=["metric", "rank"])
    return {metric: named.loc[named["metric"] == metric, "part"].tolist() for metric in _metrics(table)}


def describe_scores(table: pd.DataFrame) -> str:
    """The ranks as text: blocks under each criterion over blocks, and the order of halves."""
    halves = table["half"] if "half" in table else pd.Series("block", index=table.index)
    blocks = table.loc[halves == "block"]
    lines = []
    if len(blocks):
        ranks = blocks.pivot(index="layer", columns="metric", values="rank")
        lines.append("rank of each block (0 is removed first), blocks counted from 0\n" + ranks.to_string())
    by_half = table.loc[halves != "block"]
    lines += [
        f"halves in the order of {metric} (a: attention, m: MLP): {', '.join(map(str, parts))}"
        for metric, parts in (orders(by_half) if len(by_half) else {}).items()
    ]
    return "\n".join(lines)


def _metrics(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["metric"]))
