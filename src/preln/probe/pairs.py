"""Angular distances of all pairs of residual states, reduced one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from preln.models.residual import Tokens
from preln.probe.sums import interval, resampled

_CHUNK = 64  # tokens whose pairs are held at once: 64 (L+1)^2 float64 numbers


def pair_angles(states: Float[Tensor, "k t d"]) -> Float[Tensor, "t k k"]:
    """Angles over pi between all pairs of k states of each token, in [0, 1].

    ``2 atan2(|a-b|, |a+b|) / pi`` on unit vectors a, b (Kahan). Lengths of differences come from the cosine
    in float64, ``|a-b|^2 = 2 - 2 cos``: 1e-8 rad is lost at most, where arccos of a bfloat16 cosine loses
    every angle up to 1/16 rad.

    >>> states = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]]])
    >>> pair_angles(states)[0, 0].tolist()
    [0.0, 0.5, 1.0]
    """
    unit = torch.nn.functional.normalize(states.double(), dim=-1).transpose(0, 1)
    cosine = (unit @ unit.mT).clamp(-1.0, 1.0)
    cosine.diagonal(dim1=1, dim2=2).fill_(1.0)
    return 2.0 * torch.atan2((2.0 - 2.0 * cosine).sqrt(), (2.0 + 2.0 * cosine).sqrt()) / math.pi


class PairSums:
    """For every sequence, the angles of all pairs of its states, summed over tokens and at the last one.

    Attributes:
        rows: One tensor a sequence, ``[2, P]``, P the L (L+1)/2 pairs with start before end: the sum over
            its real tokens, and the last token's angle.
        tokens: Number of real tokens of every sequence.
    """

    def __init__(self, num_blocks: int) -> None:
        self.start, self.end = torch.triu_indices(num_blocks + 1, num_blocks + 1, offset=1)
        self.rows: list[Tensor] = []
        self.tokens: list[int] = []

    def reduce(self, tokens: Tokens, states: Sequence[Float[Tensor, "b t d"]]) -> None:
        """Reduce the states x[0] … x[L] of one sequence batch."""
        device = states[0].device
        for row in range(tokens.ids.shape[0]):
            places = tokens.real[row].nonzero().flatten().to(device)
            total, angles = None, None
            for chunk in places.split(_CHUNK):
                angles = pair_angles(torch.stack([s[row, chunk].detach().to(device) for s in states]))
                total = angles.sum(dim=0) if total is None else total + angles.sum(dim=0)
            if total is None or angles is None:
                continue
            both = torch.stack([total, angles[-1]]).cpu()
            self.rows.append(both[:, self.start, self.end])
            self.tokens.append(len(places))

    def table(self, *, draws: int, seed: int) -> pd.DataFrame:
        """One row a (start, size): the mean distance between x[start] and x[start + size], over pi.

        ``angular_distance`` is the mean over tokens, ``angular_distance_last_token`` that over sequences;
        ``…_low`` and ``…_high`` bound each by resampling the n sequences.
        """
        values = torch.stack(self.rows).numpy()
        n = len(values)
        counts = np.asarray(self.tokens, dtype=np.float64)
        columns: dict[str, npt.NDArray] = {
            "start": self.start.numpy(),
            "size": (self.end - self.start).numpy(),
        }
        for index, (name, weights) in enumerate(
            (("angular_distance", counts), ("angular_distance_last_token", np.ones(n)))
        ):
            part = values[:, index].T
            columns[name] = part.sum(axis=1) / weights.sum()
            low = high = np.full(len(part), np.nan)
            if draws and n > 1:
                sums = (resampled(summed, draws=draws, seed=seed) for summed in (part, weights))
                low, high = interval(np.divide(*sums))
            columns |= {f"{name}_low": low, f"{name}_high": high}
        return pd.DataFrame(columns | {"n": n})
