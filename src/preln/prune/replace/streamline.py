"""LLM-Streamline: one light block learns what a run of blocks did."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import drop_blocks, find_blocks
from preln.models.precision import widen
from preln.models.residual import Tokens, as_tokens, change, forward_losses, on_blocks, undisturbed
from preln.models.trial import Call, replay
from preln.prune.plan import Plan, protected_blocks
from preln.prune.replace.registry import method_plan, replacement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Example:
    """One sequence batch: how the first block of the run was called, and what its last returned (float32)."""

    call: Call
    entering: Tensor
    leaving: Tensor
    real: Tensor


@replacement("streamline")
def streamline(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    steps: int = 200,
    learning_rate: float = 1e-3,
    batch_size: int = 4,
) -> tuple[PreTrainedModel, Plan]:
    """Put one trained block in the place of ``drop`` neighbours (Chen et al. 2024, LLM-Streamline).

    The run l … l+n-1 with the smallest ``1 - mean over tokens of cos(x[l], x[l+n])`` goes; a block of the
    model's own class, which starts as block l, is trained to minimise ``|G(x[l]) - x[l+n]|^2 / d``, averaged
    over the calibration tokens, by AdamW without weight decay, its learning rate falling linearly to 0.
    So L - n + 1 blocks remain. The paper also tries a light MLP, and trains on far more text; how many steps
    are taken here is the user's choice.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: Length n of the run, at least 2.
        seed: Order of the sequence batches.
        protect: Preset of blocks that neither go nor change.
        steps: Optimiser steps.
        learning_rate: Where it starts.
        batch_size: Sequences in a step.

    Raises:
        InputError: A run of one block, protection that leaves no run, or training that ends with no smaller
            error than it began with, or than the mean of all x[l+n] has.
    """
    if drop < 2:
        raise InputError("streamline: puts one block in the place of several: --drop is at least 2")
    if steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise InputError("streamline: steps and batch_size are at least 1, learning_rate above 0")
    count = len(find_blocks(model)[1])
    start = choose_run(model, as_tokens(tokens), drop, protected_blocks(protect, count))
    examples = record(model, as_tokens(tokens), start, drop, batch_size)
    new = drop_blocks(model, range(start + 1, start + drop))
    light = find_blocks(new)[1][start]
    errors = train(light, examples, steps, learning_rate, seed)
    if not errors[1] < min(errors[0], errors[2]):
        raise InputError(
            f"streamline: the mean squared error went from {errors[0]:.3g} to {errors[1]:.3g}, and the mean "
            f"state has {errors[2]:.3g}: use more steps or another learning_rate"
        )
    gone = tuple(range(start + 1, start + drop))
    told = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
    return new, method_plan("streamline", count, drop, seed, protect, drop=gone, trained=start, **told)


@torch.no_grad()
def choose_run(model: PreTrainedModel, tokens: Tokens, length: int, spared: set[int]) -> int:
    """The start l of the unprotected run with the smallest mean of ``1 - cos(x[l], x[l+length])``.

    Raises:
        InputError: No run without a protected block.
    """
    blocks = find_blocks(model)[1]
    starts = [s for s in range(len(blocks) - length + 1) if not spared & set(range(s, s + length))]
    if not starts:
        raise InputError(f"streamline: no run of {length} unprotected blocks: use a smaller --drop")
    total = dict.fromkeys(starts, 0.0)
    device = next(model.get_input_embeddings().parameters()).device
    with undisturbed(model):
        for part in tokens.batches(4, device):
            states: list[Tensor] = []

            def keep(index: int, x: Tensor, y: Tensor, states: list[Tensor] = states) -> None:
                states.extend([x, y] if index == 0 else [y])

            with on_blocks(blocks, keep):
                forward_losses(model, part)
            for s in starts:
                gap = change(states[s], states[s + length].to(states[s].device)).gap
                total[s] += float(gap[part.real.to(gap.device)].sum(dtype=torch.float64))
    return min(starts, key=lambda s: total[s])


@torch.no_grad()
def record(model: PreTrainedModel, tokens: Tokens, start: int, length: int, batch_size: int) -> list[Example]:
    """What goes into the run and what comes out, batch by batch."""
    blocks = find_blocks(model)[1]
    device = next(model.get_input_embeddings().parameters()).device
    found: list[Example] = []
    with undisturbed(model):
        for part in tokens.batches(batch_size, device):
            calls: list[Call] = []
            flow: dict[str, Tensor] = {}

            def keep(index: int, x: Tensor, y: Tensor, flow: dict[str, Tensor] = flow) -> None:
                if index == start:
                    flow["in"] = x.detach().float()
                if index == start + length - 1:
                    flow["out"] = y.detach().float()

            def take(_: nn.Module, args: tuple, kwargs: dict, calls: list[Call] = calls) -> None:
                calls.append((args, kwargs))

            handle = blocks[start].register_forward_pre_hook(take, with_kwargs=True)
            try:
                with on_blocks(blocks, keep):
                    forward_losses(model, part)
            finally:
                handle.remove()
            args, kwargs = calls[0]
            call = (widen(tuple(args)), {key: widen(value) for key, value in kwargs.items()})
            found.append(Example(call, flow["in"], flow["out"].to(flow["in"].device), part.real))
    return found


def train(
    light: nn.Module, examples: list[Example], steps: int, learning_rate: float, seed: int
) -> tuple[float, float, float]:
    """Train the block in place; mean squared error before and after, and that of the mean state.

    It learns in float32 and is stored in its own dtype; what is measured after is what is stored.
    """
    learner = _in_float32(light).requires_grad_(True)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    before, order = mean_squared_error(learner, examples), []
    for step in range(steps):
        order = order or torch.randperm(len(examples), generator=generator).tolist()
        loss = _squares(learner, examples[order.pop()]).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1.0 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for stored, learnt in zip(light.parameters(), learner.parameters(), strict=True):
            stored.copy_(learnt)
    states = torch.cat([e.leaving[e.real] for e in examples]).double()
    spread = float((states - states.mean(0)).square().mean())
    return before, mean_squared_error(_in_float32(light), examples), spread


def _in_float32(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block).float().eval()


def _squares(light: nn.Module, example: Example) -> Tensor:
    """Squared errors at real tokens, ``[tokens, d]``."""
    return (replay(light, example.call, example.entering) - example.leaving)[example.real].square()


@torch.no_grad()
def mean_squared_error(light: nn.Module, examples: list[Example]) -> float:
    """Mean of ``|G(x[l]) - x[l+n]|^2 / d`` over all real tokens."""
    parts = [_squares(light, example).double() for example in examples]
    return float(sum(p.sum() for p in parts) / sum(p.numel() for p in parts))
