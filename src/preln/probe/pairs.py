"""Angular distances of all pairs of residual states, reduced one sequence at a time."""

from __future__ import annotations

import math

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from preln.models.residual import Tokens

_CHUNK = 64  # tokens whose pairs are held at once: 64 (L+1)^2 float64 numbers


def pair_angles(states: Float[Tensor, "k t d"]) -> Float[Tensor, "t k k"]:
    """Angles over pi between all pairs of k states of each token, in [0, 1].

    ``2 atan2(|a-b|, |a+b|) / pi`` on unit vectors a, b (Kahan). Lengths of differences come from the cosine
    in float64, ``|a-b|^2 = 2 - 2 cos``: 1e-8 rad is lost at most, where arccos of a bfloat16 cosine loses
    every angle under 0.1 rad.

    >>> states = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[-3.0, 0.0]]])
    >>> pair_angles(states)[0, 0].tolist()
    [0.0, 0.5, 1.0]
    """
    unit = torch.nn.functional.normalize(states.double(), dim=-1).transpose(0, 1)
    cosine = (unit @ unit.mT).clamp(-1.0, 1.0)
    cosine.diagonal(dim1=1, dim2=2).fill_(1.0)
    return 2.0 * torch.atan2((2.0 - 2.0 * cosine).sqrt(), (2.0 + 2.0 * cosine).sqrt()) / math.pi


class PairSums:
    """Keeps the residual states of the present sequence batch only, and (L+1)^2 sums."""

    def __init__(self, num_blocks: int) -> None:
        size = num_blocks + 1
        self.states: list[Tensor] = []
        self.all_tokens = torch.zeros(size, size, dtype=torch.float64)
        self.last_token = torch.zeros(size, size, dtype=torch.float64)
        self.tokens = 0
        self.sequences = 0

    def flush(self, tokens: Tokens) -> None:
        """Reduce the states of this sequence batch and let them go."""
        states, self.states = self.states, []
        device = states[0].device
        for row in range(tokens.ids.shape[0]):
            places = tokens.real[row].nonzero().flatten().to(device)
            for chunk in places.split(_CHUNK):
                angles = pair_angles(torch.stack([s[row, chunk].detach().to(device) for s in states]))
                self.all_tokens += angles.sum(dim=0).cpu()
            self.last_token += angles[-1].cpu()
            self.tokens += len(places)
            self.sequences += 1

    def table(self) -> pd.DataFrame:
        """One row a (start, size): the mean distance between x[start] and x[start + size], over pi."""
        size = self.all_tokens.shape[0]
        rows = [
            (start, end - start, float(self.all_tokens[start, end] / self.tokens),
             float(self.last_token[start, end] / self.sequences))
            for start in range(size)
            for end in range(start + 1, size)
        ]  # fmt: skip
        columns = ["start", "size", "angular_distance", "angular_distance_last_token"]
        return pd.DataFrame(rows, columns=columns)
