"""Means over the real tokens of each sequence, with and without its first token."""

from __future__ import annotations

import torch
from torch import Tensor

from preln.models.residual import Tokens
from preln.probe.sums import Sums

STATISTICS = ("mean", "mean_without_first_token")


class TokenSums:
    """Turns values at tokens, ``[b, t]``, into rows of sums, under the two statistics.

    Attributes:
        tokens: The present sequence batch.
        masks: ``[2, b, t]``: the tokens that count under each statistic.
        targets: ``[b]``: the number of next-token targets of each sequence.
    """

    tokens: Tokens
    masks: Tensor
    targets: Tensor

    def __init__(self, sums: Sums, wanted: set[str]) -> None:
        self.sums, self.wanted = sums, wanted

    def start(self, tokens: Tokens) -> None:
        """Prepare for a sequence batch."""
        self.tokens = tokens
        self.masks = torch.stack([tokens.real, tokens.real & ~tokens.first])
        self.targets = tokens.targets.sum(-1).double()
        self._counts = self.masks.sum(-1).double()

    def mean(
        self, measure: str, layer: int, site: str, values: Tensor, *, where: Tensor | None = None
    ) -> None:
        """Add a mean over the real tokens, or over those of them at which ``where`` holds."""
        if measure not in self.wanted:
            return
        masks, counts = self.masks.to(values.device), self._counts.to(values.device)
        if where is not None:
            masks = masks & where
            counts = masks.sum(-1).double()
        totals = torch.where(masks, values, 0.0).sum(-1, dtype=torch.float64)
        self.put(measure, layer, site, "ratio", totals, counts)

    def put(self, measure: str, layer: int, site: str, rule: str, *summands: Tensor) -> None:
        """Add summands ``[2, b]``, one row a statistic; they may be ``[b]`` where both share them."""
        if measure not in self.wanted:
            return
        for index, statistic in enumerate(STATISTICS):
            parts = [s[index] if s.ndim == 2 else s for s in summands]
            self.sums.add((measure, layer, site, statistic), rule, *parts)

    def each(self, measure: str, layer: int, site: str, values: Tensor) -> None:
        """Add one number a sequence, ``[2, b]``: the table holds its mean over sequences.

        A sequence whose only token is its first has no number without it, and does not count there.
        """
        counted = (self._counts > 0).double().to(values.device)
        self.put(measure, layer, site, "ratio", torch.where(counted > 0, values.double(), 0.0), counted)

    def total(self, measure: str, layer: int, site: str, values: Tensor, *, rule: str, scale: float) -> None:
        """Add a sum over the real tokens, times ``scale``, that is set against the number of targets."""
        if measure not in self.wanted:
            return
        totals = torch.where(self.masks.to(values.device), values, 0.0).sum(-1, dtype=torch.float64)
        self.put(measure, layer, site, rule, totals * scale, self.targets.to(values.device))
