"""From what a user asks for to a plan, and scores on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.data import fingerprint
from preln.models import find_blocks
from preln.prune.criteria import CRITERIA
from preln.prune.half_scores import score_halves
from preln.prune.plan import REMOVE, Plan, make_plan, parse_layers, plan_layers, protected_blocks, read_plan
from preln.prune.registry import HALF_METRICS
from preln.prune.replace import read_settings, repeat_plan, replace_blocks
from preln.prune.scores import choose_metrics, score
from preln.prune.surgery import prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_for(
    model: PreTrainedModel,
    tokens: Callable[[], Tensor],
    *,
    name: str,
    metric: str | None = None,
    drop: int | None = None,
    layers: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    protect: str = "none",
    seed: int = 0,
) -> Plan:
    """The plan for exactly one of: a metric with a number of blocks, blocks by hand, or a stored plan.

    What can be refused without measuring is refused before ``tokens`` are read.

    Args:
        model: The model to cut.
        tokens: Gives the calibration tokens; called only if a metric chooses.
        name: What to call the model in the plan.
        metric: Criterion that chooses, over blocks or over halves of blocks.
        drop: How many blocks, or halves, it removes.
        layers: Blocks as in ``3,4,20-23``, halves as in ``5a,6m``; ranges are half-open.
        plan: A stored plan.
        protect: Protection preset.
        seed: For criteria that draw.

    Raises:
        InputError: None or several ways at once, or blocks that make no sense.
    """
    ways = [metric is not None or drop is not None, layers is not None, plan is not None]
    if sum(ways) != 1:
        raise InputError("name the blocks in one way: --metric with --drop, or --layers, or --plan")
    count = len(find_blocks(model)[1])
    spared = protected_blocks(protect, count)
    if plan is not None:
        found = read_plan(plan)
        if found.num_blocks != count:
            raise InputError(f"{plan}: made for {found.num_blocks} blocks, but this model has {count}")
        return found
    if layers is not None:
        return plan_layers(parse_layers(layers), count, protect=protect, model=name)
    if metric is None or drop is None:
        missing = "--metric" if metric is None else "--drop"
        raise InputError(f"{missing} is missing: --metric and --drop go together")
    if metric.partition("@")[0] in HALF_METRICS:
        if drop < 1:
            raise InputError(f"--drop {drop}: remove at least 1 half")
        return _plan_halves(model, tokens(), metric, drop, protect, name)
    choose_metrics([metric])
    if not 1 <= drop < count:
        raise InputError(f"--drop {drop} of {count} blocks: remove at least 1 and keep at least 1")
    if drop > count - len(spared):
        raise InputError(f"--drop {drop}: --protect {protect} leaves only {count - len(spared)} to remove")
    if (
        metric in CRITERIA and not CRITERIA[metric].needs
    ):  # reverse order, a random one, magnitudes: no text plays a part
        batch = torch.zeros(1, 2, dtype=torch.long)
        scores = score(model, batch, [metric], seed=seed, size=drop, protect=protect)
        return make_plan(scores, metric, drop=drop, protect=protect, model=name)
    batch = tokens()
    scores = score(model, batch, [metric], seed=seed, size=drop, protect=protect)
    return make_plan(scores, metric, drop=drop, protect=protect, tokens=fingerprint(batch), model=name)


def _plan_halves(
    model: PreTrainedModel, batch: Tensor, metric: str, drop: int, protect: str, name: str
) -> Plan:
    """The plan for ``drop`` halves under a criterion over halves.

    Raises:
        InputError: Protection leaves too few halves.
    """
    table = score_halves(model, batch, [metric], size=drop, protect=protect).sort_values("rank")
    count = len(find_blocks(model)[1])
    free = table.loc[~table["layer"].isin(list(protected_blocks(protect, count)))]
    if drop > len(free):
        raise InputError(f"--drop {drop}: {metric} and --protect {protect} leave only {len(free)} halves")
    named = [f"{layer}{half[0]}" for layer, half in zip(free["layer"], free["half"], strict=True)]
    plan = plan_layers(named[:drop], count, protect=protect, model=name)
    return plan.model_copy(update={"metric": metric, "tokens": fingerprint(batch)})


def carry_out(
    model: PreTrainedModel,
    tokens: Callable[[], Tensor],
    *,
    name: str,
    method: str = REMOVE,
    settings: Sequence[str] = (),
    compact: bool = False,
    **chosen: Any,
) -> tuple[PreTrainedModel, Plan]:
    """The pruned model and its plan: blocks removed as :func:`plan_for` finds them, or replaced.

    A stored plan of a replacement is carried out again, on the same tokens.

    Args:
        model: The model to cut; untouched.
        tokens: Gives the calibration tokens; called only if they are needed.
        name: What to call the model in the plan.
        method: ``remove``, or a name from :data:`preln.prune.replace.REPLACEMENTS`.
        settings: Of the method, as ``name=value``.
        compact: Take halves out instead of setting them to zero.
        chosen: As for :func:`plan_for`.

    Raises:
        InputError: See :func:`plan_for`, :func:`preln.prune.prune` and
            :func:`preln.prune.replace.replace_blocks`.
    """
    if method == REMOVE:
        if settings:
            raise InputError(f"--set {settings[0]}: removal has no settings: name a --method")
        plan = plan_for(model, tokens, name=name, **chosen)
        if plan.method == REMOVE:
            return prune(model, plan=plan, compact=compact), plan
    if compact:
        raise InputError("--format compact: it is for halves alone, and replacements are plain: leave it out")
    if method == REMOVE:
        return repeat_plan(model, tokens(), plan), plan
    told = read_settings(method, list(settings))
    other = [key for key in ("metric", "layers", "plan") if chosen.get(key) is not None]
    if other:
        raise InputError(f"--{other[0]}: --method {method} chooses its blocks itself: give --drop alone")
    drop = chosen.get("drop")
    if drop is None:
        raise InputError(f"--drop is missing: --method {method} needs the number of blocks")
    seed, protect = chosen.get("seed", 0), chosen.get("protect", "none")
    return replace_blocks(model, tokens(), method, drop=drop, seed=seed, protect=protect, name=name, **told)
