"""ELDeR: every block's update gets a weight, and the loss decides which ones it can do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import drop_blocks, find_blocks, hidden_of
from preln.models.residual import as_tokens, forward_losses, undisturbed
from preln.prune.plan import Plan, protected_blocks
from preln.prune.replace.registry import method_plan, replacement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@replacement("elder")
def elder(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    steps: int = 50,
    learning_rate: float = 0.02,
    penalty: float = 0.01,
    batch_size: int = 4,
) -> tuple[PreTrainedModel, Plan]:
    """Learn a weight of every block's update and remove the least (after Feng et al. 2025, ELDeR).

    See :func:`elder_weights`. The blocks with the smallest ``|w_l|`` go, the deeper first among equals; the
    weights of those that stay are discarded, and their blocks act in full again: no change of its weights
    makes a block of two branches one whose update is w times as large. The paper's second stage, training
    the whole model so that blocks of small weight change the stream little before they go, is healing and
    not done here.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: How many blocks go.
        seed: Order of the sequence batches.
        protect: Preset of blocks that do not go.
        steps: Optimiser steps.
        learning_rate: Of Adam.
        penalty: lambda.
        batch_size: Sequences in a step.

    Raises:
        InputError: Settings out of range, or a loss that is not finite.
    """
    told = {"steps": steps, "learning_rate": learning_rate, "penalty": penalty, "batch_size": batch_size}
    weights = elder_weights(model, tokens, seed=seed, **told)
    spared = protected_blocks(protect, len(weights))
    order = [int(k) for k in np.lexsort((-np.arange(len(weights)), np.abs(weights))) if int(k) not in spared]
    gone = tuple(sorted(order[:drop]))
    plan = method_plan("elder", len(weights), drop, seed, protect, drop=gone, **told)
    return drop_blocks(model, gone), plan


def elder_weights(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seed: int = 0,
    steps: int = 50,
    learning_rate: float = 0.02,
    penalty: float = 0.01,
    batch_size: int = 4,
) -> npt.NDArray[np.float64]:
    """The learned weight w_l of every block's update: ``x[l+1] = x[l] + w_l F_l(x[l])``, ``[L]``.

    All start at 1; Adam minimises the mean next-token loss (nats) plus ``penalty * sum |w_l|`` over the
    calibration tokens, with the model frozen. Large means important. The paper multiplies the whole output of
    a layer by its weight, which rescales the stream that a norm then forgets; weighing the update alone makes
    0 mean "removed". Which regulariser it puts on the weights was not at hand: this is the L1 norm.

    Args:
        model: A causal model; left as it was.
        tokens: Calibration tokens ``[n, T]``.
        seed: Order of the sequence batches.
        steps: Optimiser steps.
        learning_rate: Of Adam.
        penalty: lambda.
        batch_size: Sequences in a step.

    Raises:
        InputError: Settings out of range, or a loss that is not finite.
    """
    if steps < 1 or batch_size < 1 or not learning_rate > 0 or not penalty >= 0:
        raise InputError("elder: steps and batch_size at least 1, learning_rate above 0, penalty at least 0")
    blocks = find_blocks(model)[1]
    device = next(model.get_input_embeddings().parameters()).device
    parts = list(as_tokens(tokens).batches(batch_size, device))
    weights = torch.ones(len(blocks), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    generator, order = torch.Generator().manual_seed(seed), []
    with undisturbed(model), weighted_updates(blocks, weights):
        for _ in range(steps):
            order = order or torch.randperm(len(parts), generator=generator).tolist()
            part = parts[order.pop()]
            loss = forward_losses(model, part).sum() / part.targets.sum()
            if not bool(torch.isfinite(loss)):
                raise InputError(
                    "elder: the loss is not finite: check the weights, or use a lower learning_rate"
                )
            optimizer.zero_grad()
            (loss + penalty * weights.abs().sum()).backward()
            optimizer.step()
    return weights.detach().cpu().double().numpy()


@contextmanager
def weighted_updates(blocks: Sequence[nn.Module], weights: Tensor) -> Iterator[None]:
    """Let every block return ``x + w_l (y - x)`` in place of its output y."""
    inputs: dict[int, Tensor] = {}

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            x, y = inputs.pop(index), hidden_of(output)
            mixed = x + weights[index].to(y.device, y.dtype) * (y - x)
            return mixed if isinstance(output, Tensor) else type(output)([mixed, *output[1:]])

        return hook

    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
