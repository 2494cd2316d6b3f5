"""One process or several (``accelerate launch``, ``torchrun``): who does what, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from preln.base.errors import require

Made = TypeVar("Made")


class Workers:
    """The processes that heal one model together; one, unless a launcher has started several.

    Every process takes its share of each batch; gradients are summed, and every process makes the same
    update, of the whole model or of its part of it (:mod:`preln.heal.preparing.sharding`). Process 0 writes.

    Attributes:
        rank: Number of this process.
        count: Number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        """Join the others, if the environment names any (``WORLD_SIZE``).

        Raises:
            MissingExtraError: There are others and accelerate is not installed.
        """
        self.rank, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            accelerate = require("accelerate", extra="heal")
            self._state = accelerate.PartialState(cpu=device.type == "cpu")
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> list[Any]:
        """Every ``count``-th item, from ``rank`` on."""
        return list(items[self.rank :: self.count])

    def turns(self, items: Sequence[Any]) -> list[Any]:
        """This process' share, and None where it has nothing left while others still have an item."""
        own = self.share(items)
        return own + [None] * (-(-len(items) // self.count) - len(own))

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)

    def total(self, value: float, device: torch.device) -> float:
        """Sum of a number over all processes."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(held)
        return float(held)

    def any(self, answer: bool, device: torch.device) -> bool:
        """Whether any process answers yes."""
        return self.total(float(answer), device) > 0

    def after_main(self, make: Callable[[], Made]) -> Made:
        """What ``make`` returns: in process 0 first, then in the others, who find its files there."""
        if not self.main:
            self.wait()
        made = make()
        if self.main:
            self.wait()
        return made

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()


def own_device(name: str) -> str:
    """The device of this process among several on one machine: ``cuda`` means another GPU in each.

    >>> own_device("cpu")
    'cpu'
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several and name == "cuda" else name
