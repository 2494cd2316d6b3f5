"""From a statistic with its interval to one of the four verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
STATUSES = ("supported", "unsupported", "inconclusive", "untested")


@dataclass(frozen=True)
class Measured:
    """A statistic of stored tables.

    Attributes:
        value: The statistic of the whole sample.
        resampled: The same of each bootstrap resample; empty where nothing could be resampled.
        n: Number of units that were resampled.
        note: What else a reader should know, in plain words with numbers.
        evidence: The files it came from, relative to the run folder.
    """

    value: float
    resampled: Array
    n: int
    note: str = ""
    evidence: list[str] = field(default_factory=list)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Percentile bootstrap interval, or None."""
        finite = self.resampled[np.isfinite(self.resampled)]
        if finite.size < 2 or self.n < 2:
            return None
        tail = (1 - level) / 2
        low, high = np.quantile(finite, [tail, 1 - tail])
        return float(low), float(high)


def status(interval: tuple[float, float] | None, threshold: float, direction: str) -> str:
    """The verdict: the whole interval must lie on one side of the threshold.

    The threshold itself belongs to the side that the statement claims.

    >>> status((-0.9, -0.6), -0.5, "below"), status((-0.9, -0.2), -0.5, "below")
    ('supported', 'inconclusive')
    >>> status((0.0, 0.0), 0.0, "below"), status((0.1, 0.2), 0.0, "below"), status(None, 0.0, "above")
    ('supported', 'unsupported', 'inconclusive')
    """
    if interval is None:
        return "inconclusive"
    low, high = interval
    if direction == "above":
        low, high, threshold = -high, -low, -threshold
    if high <= threshold:
        return "supported"
    return "unsupported" if low > threshold else "inconclusive"


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where one side is constant.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(v, dtype=np.float64)) for v in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.round(np.corrcoef(*ranks)[0, 1], 12))


def as_row(
    measured: Measured | None, *, claim: dict[str, Any], rule: dict[str, Any], missing: str = ""
) -> dict[str, Any]:
    """A verdict as stored: the statement, the rule that was fixed beforehand, what was found, the status."""
    interval = measured.interval() if measured else None
    value = measured.value if measured and np.isfinite(measured.value) else None
    return {
        "id": claim["id"],
        "model": rule.get("model"),
        "statement": claim["statement"],
        "source": claim["source"],
        "status": status(interval, rule["threshold"], rule["direction"]) if measured else "untested",
        "statistic": rule["statistic"],
        "meaning": rule["meaning"],
        "value": value,
        "interval": list(interval) if interval else None,
        "threshold": rule["threshold"],
        "expected": f"{rule['direction']} {rule['threshold']:g}",
        "n": measured.n if measured else 0,
        "note": measured.note if measured else missing,
        "evidence": measured.evidence if measured else [],
    }
