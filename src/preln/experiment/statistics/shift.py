"""Where the gradient goes when blocks go: the same modules before and after pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.experiment.statistics.decisions import Measured
from preln.experiment.statistics.registry import MissingData, statistic

if TYPE_CHECKING:
    from preln.experiment.lab import Lab


@statistic(
    "HYP-TAIL-SHIFT",
    "share_gain",
    "share of the last three remaining blocks, final norm and head in the squared gradient, after pruning "
    "minus before, among the parameters that remain",
    of_model=True,
)
def tail_shift(lab: Lab, model: str | None) -> Measured:
    """The same modules before and after pruning, on the same tokens, resampled together."""
    name = model or next(iter(lab.study.prune.probe), None)
    if name not in lab.study.prune.probe:
        raise MissingData("needs the gradients of a pruned model: list it under prune.probe")
    gone = set(lab.result(f"prune-{name}")["drop"])
    kept = [block for block in range(lab.num_blocks) if block not in gone]
    before, after = (_squares(lab, step) for step in ("probe", f"shift-{name}"))
    shares = [_tail_share(before, kept, lab.num_blocks), _tail_share(after, range(len(kept)), len(kept))]
    (old, old_draws), (new, new_draws) = shares
    return Measured(
        value=new - old,
        resampled=new_draws - old_draws,
        n=int(
            pd.read_parquet(lab.path("probe", "layers.parquet")).query("measure == 'grad_param'")["n"].iloc[0]
        ),
        note=f"share {old:.3f} before, {new:.3f} after",
        evidence=[f"{step}/resamples.parquet" for step in ("probe", f"shift-{name}")],
    )


def _squares(lab: Lab, step: str) -> dict[tuple[str, int], tuple[float, Any]]:
    """Squared gradient norms by site and layer, and their bootstrap samples."""
    path = lab.path(step, "resamples.parquet")
    if not path.is_file():
        raise MissingData("needs grad_param from four passes or more: give more calibration sequences")
    table = pd.read_parquet(lab.path(step, "layers.parquet")).query("measure == 'grad_param'")
    columns = (table[name] for name in ("site", "layer", "value"))
    values = {(str(site), int(layer)): float(value) ** 2 for site, layer, value in zip(*columns, strict=True)}
    found = {}
    groups: Any = pd.read_parquet(path).groupby(["site", "layer"])
    for (site, layer), group in groups:
        samples = group.sort_values(by="draw")["value"].to_numpy() ** 2
        found[str(site), int(layer)] = values[str(site), int(layer)], samples
    return found


def _tail_share(squares: dict[Any, tuple[float, Any]], blocks: Any, count: int) -> tuple[float, Any]:
    """Share of the last three of ``blocks``, final norm and head, and its bootstrap samples."""
    outside = [key for key in (("final_norm", count), ("head", count)) if key in squares]
    chosen = [("block", block) for block in blocks]
    parts = [[squares[key][part] for key in (*chosen, *outside)] for part in (0, 1)]
    tail = [[squares[key][part] for key in (*chosen[-3:], *outside)] for part in (0, 1)]
    value, draws = (np.sum(top, axis=0) / np.sum(all_, axis=0) for top, all_ in zip(tail, parts, strict=True))
    return float(value), draws
