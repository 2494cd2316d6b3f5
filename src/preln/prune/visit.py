"""One sequence batch's residual states, and the gradients at them, reduced into the evidence."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preln.models.residual import Change, Tokens, change, check_finite, wide
from preln.models.tail import Tail
from preln.prune.angles import angles

if TYPE_CHECKING:
    from preln.prune.evidence import Evidence


def _sums(moved: Change, real: Tensor) -> tuple[float, int]:
    """The gap summed over real tokens, and at how many of them one of the two states is zero."""
    empty = (moved.before * moved.after == 0) & real
    return float(moved.gap[real].sum(dtype=torch.float64)), int(empty.sum())


class Visit:
    """Reduces the residual states of one sequence batch, and the gradients at them, into the evidence."""

    def __init__(self, part: Tokens, found: Evidence, needs: Collection[str]) -> None:
        self.part, self.found, self.needs = part, found, needs
        self.keep = "left_out" in needs
        self.ahead = found.size if {"windows", "token_windows"} & set(needs) else 1
        # x[0] … x[L] where all are kept, else those that a window still needs
        self.states: list[Tensor] = []

    def __call__(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Reduce the states in front of a block and behind it."""
        """Reduce the states in front of a block and behind it."""
        real = self.part.real.to(y.device)
        with torch.no_grad():
            if "states" in self.needs:
                self._statistics(layer, change(x.detach(), y.detach()), real)
            else:
                check_finite(torch.linalg.vector_norm(wide(y.detach()), dim=-1), real, f"block {layer}")
            self._window(layer, x.detach(), y.detach(), real)
        if y.requires_grad:
            y.register_hook(lambda g: self._damage(layer, g, x, y, real))

    def _statistics(self, layer: int, moved: Change, real: Tensor) -> None:
        check_finite(moved.before, real, f"input of block {layer}")
        check_finite(moved.after, real, f"block {layer}")
        gap, empty = _sums(moved, real)
        self.found.gap[layer] += gap
        self.found.empty[layer] += empty
        for row, summed in enumerate(moved.squares(real)):
            self.found.squares[row, layer] += float(summed.sum(dtype=torch.float64))

    def _window(self, layer: int, x: Tensor, y: Tensor, real: Tensor) -> None:
        """Angles across the windows that end behind this block."""
        if not self.states:
            self.states.append(x)
        self.states.append(y)
        start = layer + 1 - self.ahead
        if "windows" in self.needs:
            last = self.part.last.to(y.device)
            rows = torch.arange(len(last), device=y.device)
            ends = [s.to(y.device)[rows, last].double() for s in (x, y)]
            self.found.adjacent_last[layer] += float(angles(*ends).sum())
            if start >= 0:
                first = self.states[-1 - self.ahead].to(y.device)[rows, last].double()
                self.found.across_last[start] += float(angles(first, ends[1]).sum())
        if "token_windows" in self.needs and start >= 0:
            across = angles(self.states[-1 - self.ahead].to(y.device), y)
            self.found.across[start] += float(across[real].sum(dtype=torch.float64))
        if not self.keep:
            self.states = self.states[-1 - self.ahead :]

    def against_post_norm(self, tail: Tail, final: Tensor) -> None:
        """The last block's update as seen behind the final norm."""
        real = self.part.real.to(final.device)
        before = self.states[-2]
        with torch.no_grad():
            after = tail.normed(final[real], self.part.ids[self.part.real])
            moved = change(before.to(after.device)[real.to(after.device)][None], after[None])
        gap, empty = _sums(moved, torch.ones_like(moved.before, dtype=torch.bool))
        self.found.post = (self.found.post[0] + gap, self.found.post[1] + empty)

    @torch.no_grad()
    def _damage(self, layer: int, g: Tensor, x: Tensor, y: Tensor, real: Tensor) -> None:
        per_token = -(wide(g) * (wide(y) - wide(x))).sum(-1)
        self.found.damage[layer] += float(per_token[real].sum(dtype=torch.float64))
