"""LaCo: layers collapse into the one in front of them as long as the model stays like itself."""

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


@replacement("laco")
def laco(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    size_of_merge: int = 4,
    interval: int = 2,
    threshold: float = 0.95,
    step: float = 0.05,
) -> tuple[PreTrainedModel, Plan]:
    """Merge following blocks into an earlier one (Yang, Cao, Zhao 2024, LaCo, Algorithm 1).

    ``theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l)``, and the blocks l+1 … l+m go, with
    ``m = size_of_merge - 1``. l moves from deep to shallow; a merge is kept if the mean cosine of the final
    states (what the head reads, averaged over tokens) with those of the original model exceeds the
    threshold, and then l moves up by ``interval``, else by one. The differences are all taken from the
    theta_l before the merge: published code adds them one after another to the changed theta_l, which ends in
    the weights of the last merged block.

    The paper fixes the threshold and takes whatever number of blocks goes. Here the number is given: the
    last merge is as large as is still needed, and where a sweep ends too early, the threshold falls by
    ``step`` and the next sweep goes on from the merged model.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: How many blocks go.
        seed: Nothing is drawn; recorded only.
        protect: Preset of blocks that neither go nor change.
        size_of_merge: Blocks that become one (C in the paper).
        interval: How far l moves after a merge (I in the paper).
        threshold: Where the threshold starts (T in the paper).
        step: By how much it falls.

    Raises:
        InputError: Settings out of range, or protection that leaves no neighbours to merge.
    """
    if size_of_merge < 2 or interval < 1 or not step > 0:
        raise InputError("laco: size_of_merge is at least 2, interval at least 1, step above 0")
    count = len(find_blocks(model)[1])
    spared = spared_blocks(protect, count)
    similarity = likeness(model, tokens)
    groups, level = single_blocks(count), threshold
    while (left := drop - len(gone(groups, count))) > 0:
        groups, changed = _sweep(
            groups, left, size_of_merge, interval, spared, lambda g, level=level: similarity(g) > level
        )
        if not changed and level < -1.0:
            raise InputError(
                f"laco: no {size_of_merge} unprotected neighbours left: use a smaller size_of_merge"
            )
        level = round(level - step, 9)
    plan = method_plan(
        "laco",
        count,
        drop,
        seed,
        protect,
        drop=gone(groups, count),
        size_of_merge=size_of_merge,
        interval=interval,
        threshold=threshold,
        step=step,
        merged=written(groups),
    )
    return merge(model, groups), plan


def _sweep(
    groups: list[Group],
    left: int,
    size: int,
    interval: int,
    spared: set[int],
    accept: Callable[[Sequence[Group]], bool],
) -> tuple[list[Group], bool]:
    """One pass from deep to shallow; at most ``left`` blocks go. Also says whether anything changed."""
    changed, place = False, max(len(groups) - size, 0)
    while place >= 0 and left > 0:
        extra = min(size - 1, len(groups) - 1 - place, left)
        window = groups[place : place + extra + 1]
        merged = [*groups[:place], add_differences(window), *groups[place + extra + 1 :]]
        if extra > 0 and may_merge(window, spared) and accept(merged):
            groups, changed, left = merged, True, left - extra
            place = min(place - interval, len(groups) - size)
        else:
            place -= 1
    return groups, changed
