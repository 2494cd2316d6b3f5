"""What a healing run stores to continue later: where it stands, trained tensors, optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from preln.heal.preparing.sharding import cut, gathered, join


@dataclass
class Progress:
    """Where a run stands; together with the trained tensors and the optimizer's, all that a resume needs.

    The order of the rows and every dropout mask are functions of the seed and the step (see
    :func:`preln.heal.rows.examples.batch_rows`), so no generator state is stored.

    Attributes:
        step: Updates done.
        tokens: Tokens seen in training, padding not counted.
        supervised: Tokens whose prediction counted in the training loss.
        seconds: Time spent in updates, validation and checkpoints not counted.
        best_step: Step of the lowest validation loss so far; None before the first.
        best_loss: That loss.
        stale: Validation losses since that one.
        history: Rows of the training table.
    """

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, keep: bool = True
) -> dict[str, Tensor]:
    """AdamW's state as ``<parameter>/step``, ``/exp_avg`` and ``/exp_avg_sq``; empty at the start.

    Of sharded parameters it is gathered, in which every process takes part, also one that does not ``keep``.
    """
    state = {
        f"{name}/{entry}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
    }
    return gathered(state, keep=keep)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put the stored state back; of a sharded parameter, the part of it that this process holds."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if entry == "step" and not isinstance(optimizer, torch.optim.AdamW):
            state[entry] = int(value)  # bitsandbytes counts in a number
        elif entry == "step":  # torch in a tensor: on the CPU, or beside the parameter where it is fused
            where = parameter.device if optimizer.defaults.get("fused") else value.device
            state[entry] = value.to(where, copy=True)
        else:
            state[entry] = join(cut(value, parameter).to(parameter.device, copy=True), parameter)
