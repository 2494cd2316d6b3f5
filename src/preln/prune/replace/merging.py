"""Blocks merged into one by linear combination of their weights, and how like the model stays itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import drop_blocks, find_blocks, view
from preln.models.residual import Tokens, as_tokens, forward_losses, undisturbed, wide
from preln.prune.plan import protected_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the weights with which former blocks, by index, make up one block
Group = Mapping[int, float]


def single_blocks(count: int) -> list[Group]:
    """Every block by itself."""
    return [{index: 1.0} for index in range(count)]


def add_differences(groups: Sequence[Group]) -> Group:
    """``theta_0 + sum_k (theta_k - theta_0)`` over the groups (Yang et al. 2024, LaCo, Eq. 1)."""
    total: dict[int, float] = {}
    for place, group in enumerate(groups):
        factor = 2.0 - len(groups) if place == 0 else 1.0
        for index, weight in group.items():
            total[index] = total.get(index, 0.0) + factor * weight
    return total


def may_merge(groups: Sequence[Group], spared: set[int]) -> bool:
    """Whether no protected block is among those that would go or change."""
    return not any(index in spared for group in groups for index in group)


@contextmanager
def merged_weights(blocks: Sequence[nn.Module], groups: Sequence[Group]) -> Iterator[list[nn.Module]]:
    """The first block of every group, for a while with the group's combined weights; then as before.

    Sums are taken in float32 or wider.

    Raises:
        InputError: Blocks of a group whose weights differ in name or shape.
    """
    former: list[tuple[nn.Parameter, Tensor]] = []
    first = [blocks[min(group)] for group in groups]
    try:
        for group, block in zip(groups, first, strict=True):
            if len(group) == 1:
                continue
            own = dict(block.named_parameters())
            members = {index: dict(blocks[index].named_parameters()) for index in group}
            for index, theirs in members.items():
                if {k: p.shape for k, p in theirs.items()} != {k: p.shape for k, p in own.items()}:
                    raise InputError(f"blocks {min(group)} and {index} differ in shape: they cannot merge")
            sums = {name: sum(w * wide(members[i][name].detach()) for i, w in group.items()) for name in own}
            for name, parameter in own.items():
                former.append((parameter, parameter.data))
                parameter.data = torch.as_tensor(sums[name]).to(parameter.dtype)
        yield first
    finally:
        for parameter, data in former:
            parameter.data = data


def merge(model: PreTrainedModel, groups: Sequence[Group]) -> PreTrainedModel:
    """A new plain model with one block a group; ``model`` is untouched."""
    blocks = find_blocks(model)[1]
    kept = {min(group) for group in groups}
    with merged_weights(blocks, groups):
        return drop_blocks(model, [i for i in range(len(blocks)) if i not in kept])


@torch.no_grad()
def final_states(model: nn.Module, tokens: Tokens, batch_size: int = 4) -> Tensor:
    """What the head reads (behind the final norm) at every real token, ``[tokens, d]``, on the CPU."""
    head = getattr(model, "get_output_embeddings")()  # noqa: B009 - of a model, or of a view of one
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    device = next(model.parameters()).device
    found = []
    try:
        for part in tokens.batches(batch_size, device):
            seen.clear()
            forward_losses(model, part)
            found.append(wide(seen[0])[part.real].cpu())
    finally:
        handle.remove()
    return torch.cat(found)


def likeness(model: PreTrainedModel, batch: Tensor) -> Callable[[Sequence[Group]], float]:
    """A function from groups to the mean cosine, over tokens, of merged and original final states.

    The states are those that the head reads, at every token (the published code of both merging methods
    takes the last hidden state of whole texts; how it is reduced to one vector differs between them). What
    was measured once is not measured again: a sweep with a lower threshold tries the same mergers first.
    """
    tokens, blocks = as_tokens(batch), find_blocks(model)[1]
    with undisturbed(model):
        expected = final_states(model, tokens)

    known: dict[tuple[tuple[tuple[int, float], ...], ...], float] = {}

    def similarity(groups: Sequence[Group]) -> float:
        key = tuple(tuple(sorted(group.items())) for group in groups)
        if key not in known:
            known[key] = measured(groups)
        return known[key]

    def measured(groups: Sequence[Group]) -> float:
        with undisturbed(model), merged_weights(blocks, groups) as first:
            found = final_states(view(model, first), tokens)
        return float(torch.cosine_similarity(found, expected, dim=-1).double().mean())

    return similarity


def gone(groups: Sequence[Group], count: int) -> tuple[int, ...]:
    """The blocks that are no group's first: those that have been merged away."""
    return tuple(sorted(set(range(count)) - {min(group) for group in groups}))


def spared_blocks(protect: str, count: int) -> set[int]:
    """The protected blocks of a model of ``count`` blocks."""
    return protected_blocks(protect, count)


def written(groups: Sequence[Group]) -> str:
    """The merged groups as text: ``3+4+5 9+10``."""
    return " ".join("+".join(map(str, sorted(group))) for group in groups if len(group) > 1)
