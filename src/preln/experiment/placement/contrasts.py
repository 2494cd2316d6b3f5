"""Verdicts of a placement study: numbers of models of one placement against another's, paired by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from preln.experiment.placement.study import Contrast
from preln.experiment.statistics.decisions import Measured, as_row

ROUNDING = 12.0**-0.5  # standard deviation of what rounding to a whole number throws away


@dataclass(frozen=True)
class OverSeeds(Measured):
    """A mean over seeds, whose interval is Student's.

    The bootstrap of three to five numbers covers far less than it says: its interval never leaves the range
    of the numbers.

    Attributes:
        spread: Standard deviation of the seeds' numbers.
    """

    spread: float = float("nan")

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """``mean ± t s / sqrt(n)`` with n - 1 degrees of freedom; None with fewer than two seeds."""
        from scipy.stats import t

        if self.n < 2 or not np.isfinite(self.value):
            return None
        half = float(t.ppf(0.5 + level / 2, self.n - 1)) * self.spread / self.n**0.5
        return self.value - half, self.value + half


def contrast_of(contrast: Contrast, numbers: pd.DataFrame, untrained: set[tuple[str, int]]) -> OverSeeds:
    """The contrast over all seeds that have what it needs.

    Whole numbers (prunable depths) are known to half a unit: their standard deviation counts as that of
    rounding at least, so that seeds which happen to agree do not make an interval of no width.

    Args:
        contrast: What is compared.
        numbers: placement, seed, state, quantity, value.
        untrained: Placement and seed of models that did not train: they decide nothing about trained models.
    """
    rows = numbers.query("quantity == @contrast.quantity and state == @contrast.state")
    table = rows.pivot(index="seed", columns="placement", values="value")
    sides = [side for side in (contrast.of, contrast.against) if side is not None]
    values, notes, seeds = [], [], []
    for seed in table.index:
        broken = [p for p in sides if contrast.state == "trained" and (p, int(seed)) in untrained]
        broken += [p for p in sides if p not in broken and not np.isfinite(table[p].get(seed, np.nan))]
        if broken:
            notes.append(f"seed {seed} left out: {', '.join(broken)} did not train or has no such number")
            continue
        value = float(table.loc[seed, contrast.of])
        values.append(value - float(table.loc[seed, contrast.against]) if contrast.against else value)
        seeds.append(seed)
    whole = contrast.quantity.startswith("prunable_")
    floor = ROUNDING * len(sides) ** 0.5 if whole else 0.0
    spread = max(float(np.std(values, ddof=1)), floor) if len(values) > 1 else float("nan")
    for side in sides:
        known = [f"{float(table.loc[s, side]):.3g}" for s in seeds]
        notes.insert(0, f"{side}: {', '.join(known) or 'none'}")
    return OverSeeds(
        value=float(np.mean(values)) if values else float("nan"),
        resampled=np.empty(0),
        n=len(values),
        note=f"by seed, {'; '.join(notes)}",
        evidence=["decide/numbers.parquet"],
        spread=spread,
    )


def verdict(contrast: Contrast, numbers: pd.DataFrame, untrained: set[tuple[str, int]]) -> dict[str, Any]:
    """The verdict as stored; ``untested`` where no seed has what the contrast needs."""
    from preln.theory.ledger import registry

    claim = registry()[contrast.id]
    rule = contrast.model_dump() | {
        "model": contrast.name,
        "statistic": contrast.quantity,
        "meaning": meaning(contrast),
    }
    described = {"id": claim.id, "statement": claim.statement, "source": claim.source}
    found = contrast_of(contrast, numbers, untrained)
    return as_row(
        found if found.n else None, claim=described, rule=rule, missing=f"no seed can tell: {found.note}"
    )


def meaning(contrast: Contrast) -> str:
    """The contrast in words."""
    name = contrast.quantity
    words = {
        "_spearman": "rank correlation with depth of the norm of {}",
        "_log_ratio": "log10 of the first over the last value by depth of {}",
        "_deep_minus_shallow": "mean over the deep half, last block left out, less the shallow half, of {}",
    }
    ends = [end for end in words if name.endswith(end)]
    said = words[ends[0]].format(name.removesuffix(ends[0])) if ends else ""
    if not said:
        order, _, rise = name.removeprefix("prunable_").rpartition("_")
        kept = order.endswith("_keep_last")
        said = f"blocks that can go, {order.removesuffix('_keep_last')} first, at {rise} nats at most"
        said += ", the last block kept" if kept else ""
    less = "" if contrast.against is None else f", less {contrast.against}'s"
    when = {"initial": "before training", "trained": "after training"}[contrast.state]
    return f"{said}: {contrast.of}'s{less}, {when}; mean over seeds with Student's interval"
