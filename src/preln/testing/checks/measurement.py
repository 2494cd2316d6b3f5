"""Means over random networks with intervals, beside the curves and bands that theory puts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preln.theory import Evidence

LEVEL = 0.99
ROUNDING = 1e-9
"""Relative slack of comparisons, for what has no spread over networks but rounding."""


def as_it_is(mean: Tensor) -> Tensor:
    """Draw means themselves."""
    return mean


@dataclass(frozen=True)
class Theory:
    """A curve (`low` is `high`) that must lie in the interval, or a band that the interval must lie in.

    Attributes:
        name: in the legend.
        low: `[x]`, on the scale that is drawn.
        high: `[x]`.
    """

    name: str
    low: Tensor
    high: Tensor

    @property
    def is_curve(self) -> bool:
        """True if there is one value a depth."""
        return self.low is self.high

    def holds(self, low: Tensor, high: Tensor) -> Tensor:
        """Compare with an interval's ends, `[x]` booleans."""
        slack = ROUNDING * self.high.abs()
        if self.is_curve:
            return (low <= self.high + slack) & (self.high - slack <= high)
        return (self.low - slack <= low) & (high <= self.high + slack)

    def as_dict(self, x: Sequence[float], measured: str) -> dict[str, Any]:
        """Return plain data for the ledger; `of` names what was measured."""
        ends = {"y": self.high} if self.is_curve else {"low": self.low, "high": self.high}
        return {"name": self.name, "of": measured, "x": list(x)} | {k: v.tolist() for k, v in ends.items()}


def curve(name: str, y: Tensor) -> Theory:
    """Return a curve."""
    return Theory(name, y, y)


@dataclass(frozen=True)
class Measured:
    """One statistic by depth.

    Attributes:
        name: in the legend.
        x: the depths.
        samples: `[networks, x]`.
        theory: what its mean is compared with, or None.
        show: turns means into what is drawn, such as a root; monotone.
    """

    name: str
    x: Sequence[float]
    samples: Tensor
    theory: Theory | None = None
    show: Callable[[Tensor], Tensor] = as_it_is


@dataclass(frozen=True)
class Panel:
    """Statistics in one pair of axes."""

    title: str
    xlabel: str
    ylabel: str
    measured: Sequence[Measured]
    yscale: str = "linear"


def interval(samples: Tensor, comparisons: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and both ends over the first dimension, at level 1 - 0.01/comparisons (Student).

    Divided by the number of comparisons (Bonferroni), all intervals hold at once at level 0.99.
    """
    from scipy.stats import t

    n = len(samples)
    mean = samples.mean(0)
    half = float(t.ppf(1 - (1 - LEVEL) / max(comparisons, 1) / 2, n - 1)) * samples.std(0) / n**0.5
    return mean, mean - half, mean + half


def measurement(
    panels: Sequence[Panel], *, model: str, data: str, seed: int, broken: Sequence[str] = ()
) -> Evidence:
    """Compare everything at once; return `measurement` evidence.

    It passes if something was compared, nothing lies outside, and nothing is `broken`.

    Args:
        panels: what was measured.
        model: the networks, in words.
        data: what they were fed.
        seed: of the generator.
        broken: what else went wrong, one line each.
    """
    compared = sum(len(m.x) for panel in panels for m in panel.measured if m.theory)
    outside = list(broken)
    plain = []
    for panel in panels:
        drawn, theory = [], []
        for m in panel.measured:
            mean, *ends = (m.show(value) for value in interval(m.samples, compared))
            low, high = torch.minimum(*ends), torch.maximum(*ends)
            numbers = {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
            drawn.append({"name": m.name, "x": list(m.x)} | numbers)
            if m.theory:
                theory.append(m.theory.as_dict(m.x, m.name))
                outside += _misses(m, m.theory.holds(low, high))
        words = {k: getattr(panel, k) for k in ("title", "xlabel", "ylabel", "yscale")}
        plain.append(words | {"measured": drawn, "theory": theory})
    networks = min((len(m.samples) for panel in panels for m in panel.measured), default=0)
    detail = {"model": model, "data": data, "n": networks, "interval": LEVEL, "seed": seed}
    detail |= {"comparisons": compared, "outside": outside, "panels": plain}
    return Evidence("measurement", "pass" if compared and not outside else "fail", detail)


def _misses(measured: Measured, holds: Tensor) -> Iterator[str]:
    assert measured.theory is not None
    for at, good in zip(measured.x, holds.tolist(), strict=True):
        if not good:
            yield f"{measured.name} against {measured.theory.name} at {at:g}"
