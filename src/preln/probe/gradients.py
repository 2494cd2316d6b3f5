"""Parameter gradients by block and group: the exact norm, and an interval from random sketches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from preln.probe.sums import COLUMNS, interval, multiplicities

_ROWS, _WIDTH = 8, 256
MIN_UNITS = 4  # resamples of fewer units are too few to show a spread
MAX_UNITS = 64  # sketches are kept for at most this many units, so memory does not grow with the tokens
Group = tuple[int, str, str, list[nn.Parameter]]


def units(batches: int) -> npt.NDArray[np.int64]:
    """The resampling unit of each sequence batch: itself, or one of 64 runs of consecutive batches.

    >>> units(3).tolist(), units(200)[-1].item()
    ([0, 1, 2], 63)
    """
    return np.arange(batches) * min(batches, MAX_UNITS) // batches


@dataclass(frozen=True)
class Squares:
    """Squared norms by group, and in every bootstrap sample.

    Attributes:
        sites: (layer, site) of every group and sum of groups, and the groups' indices that make it up.
        gradient: ``[groups]`` squared norms of the gradients of the mean token loss.
        weight: ``[groups]`` squared norms of the parameters.
        resampled: ``[groups, draws]``; draws is 0 where there are too few units.
        n: Number of resampling units.
    """

    sites: dict[tuple[int, str], list[int]]
    gradient: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    resampled: npt.NDArray[np.float64]
    n: int

    def samples(self, layer: int, site: str = "block") -> npt.NDArray[np.float64]:
        """The gradient's norm at a site in every bootstrap sample."""
        return np.sqrt(self.resampled[self.sites[layer, site]].sum(axis=0))

    def table(self, wanted: set[str]) -> pd.DataFrame:
        """The rows of ``grad_param``, ``grad_param_relative`` and ``grad_tail_share``."""
        rows = []
        for (layer, site), members in self.sites.items():
            value, size = (float(np.sqrt(v[members].sum())) for v in (self.gradient, self.weight))
            low, high = self._interval(self.samples(layer, site))
            rows.append(("grad_param", layer, site, "mean", value, low, high, self.n))
            relative = [v / size if size else float("nan") for v in (value, low, high)]
            rows.append(("grad_param_relative", layer, site, "mean", *relative, self.n))
        last = max((layer for layer, _ in self.sites), default=-1)
        layers = np.array([min(layer for (layer, _), m in self.sites.items() if i in m)
                           for i in range(len(self.gradient))])  # fmt: skip
        for layer in range(last + 1):
            tail = layers >= layer
            value = self.gradient[tail].sum() / self.gradient.sum()
            low, high = self._interval(self.resampled[tail].sum(axis=0) / self.resampled.sum(axis=0))
            rows.append(("grad_tail_share", layer, "block", "mean", float(value), low, high, self.n))
        table = pd.DataFrame(rows, columns=COLUMNS)
        return table.loc[table["measure"].isin(list(wanted))]

    @staticmethod
    def _interval(samples: npt.NDArray[np.float64]) -> tuple[float, float]:
        if not samples.size:
            return float("nan"), float("nan")
        low, high = interval(samples)
        return float(low), float(high)


def _square(tensor: Tensor) -> float:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return float(torch.linalg.vector_norm(wide).double() ** 2)


class GradientSums:
    """Reads the gradients that accumulate in ``.grad``.

    A resample of sequence batches needs the norm of ``sum_b c_b g_b``, and keeping every g_b would take one
    copy of the parameters a batch. Kept instead is a linear sketch S g_b with random signs S, whose squared
    norm is that of its argument on average (Achlioptas 2003; its relative error is 3 % for a large matrix).
    The sketches give ratios of resampled to original norms only; the norms themselves are exact. A squared
    norm of a mean is larger in a resample than in the sample, by the mean's variance on average, so the
    resampled squares are moved by their mean excess, down to the measured value.

    Args:
        groups: From :func:`preln.probe.groups.parameter_groups`.
        batches: Number of sequence batches to come; 0 where no interval is wanted.
        seed: Fixes the signs.
    """

    def __init__(self, groups: Sequence[Group], *, batches: int, seed: int) -> None:
        self.groups = list(groups)
        self._units = units(batches) if batches >= MIN_UNITS and groups else np.zeros(0, dtype=np.int64)
        self._seed = seed
        self._signs: dict[tuple[int, int, torch.device], Tensor] = {}
        self.targets: list[int] = []
        self.running: list[Tensor] = []
        self.done = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters whose gradients are read."""
        return [p for *_, members in self.groups for p in members]

    def _sign(self, place: int, rows: int, device: torch.device) -> Tensor:
        # independent within a group; groups of equal shape share signs, for only groups' squares are summed
        key = (place, rows, device)
        if key not in self._signs:
            generator = torch.Generator().manual_seed(self._seed + 7919 * place + 104729 * rows)
            bits = torch.randint(0, 2, (_ROWS, rows), generator=generator, dtype=torch.int8)
            self._signs[key] = ((2.0 * bits - 1.0) / _ROWS**0.5).to(device)
        return self._signs[key]

    def _sketch(self, place: int, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(-1).float()
        whole = flat.numel() // _WIDTH * _WIDTH
        rows = flat[:whole].view(-1, _WIDTH)
        signs = self._sign(place, len(rows) + 1, flat.device)
        part = signs[:, :-1] @ rows
        part[:, : flat.numel() - whole] += torch.outer(signs[:, -1], flat[whole:])
        return part.cpu()

    def after_batch(self, targets: int) -> None:
        """Take note of a sequence batch with this many targets, and sketch the sum of gradients so far."""
        index, self.done = self.done, self.done + 1
        if not len(self._units):
            return
        unit = int(self._units[index])
        if unit == len(self.targets):
            self.targets.append(0)
        self.targets[unit] += targets
        if index + 1 < len(self._units) and self._units[index + 1] == unit:
            return
        sketches = []
        for *_, members in self.groups:
            total = torch.zeros(_ROWS, _WIDTH)
            for place, parameter in enumerate(members):
                if parameter.grad is not None:
                    total += self._sketch(place, parameter.grad)
            sketches.append(total.flatten())
        self.running.append(torch.stack(sketches))

    def squares(self, *, draws: int, seed: int) -> Squares:
        """The squared norms of what has accumulated, and of its bootstrap samples over units."""
        sites: dict[tuple[int, str], list[int]] = {}
        for index, (layer, half, group, _) in enumerate(self.groups):
            outside = half in ("final_norm", "head")
            for site in dict.fromkeys([group] if outside else ["block", half, group]):
                sites.setdefault((layer, site), []).append(index)
        weight = np.array([sum(_square(p.detach()) for p in m) for *_, m in self.groups])
        gradient = np.array([sum(_square(p.grad) for p in m if p.grad is not None) for *_, m in self.groups])
        n = len(self.running)
        resampled = np.empty((len(self.groups), 0))
        if n >= MIN_UNITS and draws:
            running = torch.stack(self.running, dim=-1).double()
            shares = torch.diff(running, dim=-1, prepend=torch.zeros_like(running[..., :1]))
            gram = (shares.mT @ shares).numpy()
            counts = multiplicities(n, draws=draws, seed=seed)
            weights = np.asarray(self.targets, dtype=np.float64)
            scaled = counts * (weights.sum() / (weights @ counts))
            ratio = np.einsum("nd,gnm,md->gd", scaled, gram, scaled, optimize=True)
            ratio /= np.maximum(gram.sum(axis=(1, 2)), 1e-300)[:, None]
            excess = ratio.mean(axis=1, keepdims=True) - 1.0
            resampled = gradient[:, None] * np.maximum(ratio - excess, 0.0)
        return Squares(sites, gradient, weight, resampled, n or self.done)
