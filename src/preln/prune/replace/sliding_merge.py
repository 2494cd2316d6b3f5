"""Sliding merge: a window grows downwards from the top as long as its merger keeps the model like itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from preln.base.errors import InputError
from preln.models import find_blocks
from preln.prune.plan import Plan
from preln.prune.replace.merging import (
    Group,
    add_differences,
    gone,
    likeness,
    may_merge,
    merge,
    single_blocks,
    spared_blocks,
    written,
)
from preln.prune.replace.registry import method_plan, replacement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@replacement("sliding_merge")
def sliding_merge(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    threshold: float = 0.95,
    step: float = 0.05,
) -> tuple[PreTrainedModel, Plan]:
    """Merge windows of neighbours from the top down (Ding et al. 2025, Sliding-Window Merging).

    The window starts at the last block and takes in one more block below as long as the model with the whole
    window merged into its lowest block, ``theta_i + sum_k (theta_{i+k} - theta_i)``, stays like the original
    one: mean cosine of the final states (what the head reads, averaged over tokens) above the threshold. When
    it does not, the window is closed without that block, and the next one starts at it.

    Which similarity decides, and how a window is merged, follows the paper's abstract and its description
    by others; its equations were not at hand. Its analysis of the layers by CKA plays no part here. The paper
    fixes the threshold; here the number of blocks is given, and the threshold is the highest of
    ``threshold, threshold - step, …`` at which that many go, each tried from the original model.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: How many blocks go.
        seed: Nothing is drawn; recorded only.
        protect: Preset of blocks that neither go nor change.
        threshold: Where the threshold starts.
        step: By how much it falls.

    Raises:
        InputError: A step of 0, or protection that leaves too few neighbours to merge.
    """
    if not step > 0:
        raise InputError("sliding_merge: step is above 0")
    count = len(find_blocks(model)[1])
    spared = spared_blocks(protect, count)
    similarity = likeness(model, tokens)

    level, groups = threshold, single_blocks(count)
    while len(gone(groups, count)) < drop:
        if level < -1.0 - step:
            raise InputError(
                f"sliding_merge: protection {protect!r} leaves too few neighbours to merge {drop}"
            )
        groups = slide(count, drop, spared, lambda g, level=level: similarity(g) > level)
        level = round(level - step, 9)
    plan = method_plan(
        "sliding_merge",
        count,
        drop,
        seed,
        protect,
        drop=gone(groups, count),
        threshold=threshold,
        step=step,
        merged=written(groups),
    )
    return merge(model, groups), plan


def slide(count: int, drop: int, spared: set[int], accept: Callable[[Sequence[Group]], bool]) -> list[Group]:
    """Groups of blocks after one pass of the window from the last block to the first."""
    closed: list[Group] = []
    top, low = count - 1, count - 1
    window: Group = {top: 1.0}
    while low > 0 and len(gone([*_below(low), window, *closed], count)) < drop:
        members: list[Group] = [{index: 1.0} for index in range(low - 1, top + 1)]
        wider = add_differences(members)
        if may_merge(members, spared) and accept([*_below(low - 1), wider, *closed]):
            window, low = wider, low - 1
        else:
            closed, top, low = [window, *closed], low - 1, low - 1
            window = {top: 1.0}
    return [*_below(low), window, *closed]


def _below(low: int) -> list[Group]:
    return single_blocks(low)
