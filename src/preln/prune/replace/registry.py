"""The registry of replacements, and the one call path they share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from preln.base.errors import InputError
from preln.data import fingerprint
from preln.models import find_blocks
from preln.models.residual import as_tokens
from preln.prune.plan import Plan, protected_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replacement = Callable[..., "tuple[PreTrainedModel, Plan]"]
REPLACEMENTS: dict[str, Replacement] = {}
_SHARED = ("model", "tokens", "drop", "seed", "protect")


def replacement(name: str) -> Callable[[Replacement], Replacement]:
    """Register ``function(model, tokens, drop, *, seed, protect, **settings) -> (new model, plan)``."""

    def register(function: Replacement) -> Replacement:
        if name in REPLACEMENTS:
            raise ValueError(f"replacement {name!r}: registered twice")
        REPLACEMENTS[name] = function
        return function

    return register


def settings_of(method: str) -> dict[str, Any]:
    """The settings that a method takes, with their defaults.

    Raises:
        InputError: An unknown method.
    """
    if method not in REPLACEMENTS:
        known = ", ".join(["remove", *REPLACEMENTS])
        raise InputError(f"method {method!r} is unknown: choose from {known}")
    parameters = inspect.signature(REPLACEMENTS[method]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _SHARED}


def read_settings(method: str, texts: list[str]) -> dict[str, int | float]:
    """Settings written as ``name=value``, as numbers.

    Raises:
        InputError: An unknown method or name, or a value of another kind than the default.
    """
    known, found = settings_of(method), {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise InputError(f"--set {text}: {method} has the settings {', '.join(known)}: write name=value")
        kind = type(known[name])
        try:
            found[name] = kind(value)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise InputError(f"--set {text}: {name} is {wanted}, by default {known[name]}") from error
    return found


def replace_blocks(
    model: PreTrainedModel,
    batch: Tensor,
    method: str,
    *,
    drop: int,
    seed: int = 0,
    protect: str = "none",
    name: str | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, Plan]:
    """Make up for ``drop`` blocks by one of :data:`REPLACEMENTS`; the model given is untouched.

    Args:
        model: A causal model.
        batch: Calibration tokens ``[n, T]``.
        method: Name of the replacement.
        drop: How many blocks it is about (see the method for what becomes of them).
        seed: For methods that draw.
        protect: Protection preset: blocks that neither go nor change.
        name: What to call the source in the plan.
        settings: Settings of the method.

    Returns:
        A new plain Hugging Face model, and the plan with everything that was told and chosen.

    Raises:
        InputError: An unknown method or setting, a number of blocks that makes no sense, quantised weights,
            bad tokens, or what the method itself refuses.
    """
    known = settings_of(method)
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise InputError(f"{method}: no setting {unknown[0]!r}: it has {', '.join(known)}")
    for key, value in settings.items():
        whole = type(known[key]) is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise InputError(f"{method}: {key}={value!r}: a {'whole ' if whole else ''}number is needed")
        if not math.isfinite(value):
            raise InputError(f"{method}: {key}={value!r}: a finite number is needed")
    blocks = find_blocks(model)[1]
    left = len(blocks) - len(protected_blocks(protect, len(blocks)))
    if isinstance(drop, bool) or not isinstance(drop, int) or not 1 <= drop < len(blocks):
        raise InputError(f"drop {drop} of {len(blocks)} blocks: name at least 1 and keep at least 1")
    if drop > left:
        raise InputError(f"drop {drop}: protection {protect!r} leaves only {left} blocks")
    if getattr(model, "is_quantized", False):
        raise InputError(
            f"{method}: changes weights, and these are quantised: load the model in a float dtype"
        )
    as_tokens(batch)
    new, plan = REPLACEMENTS[method](model, batch, drop, seed=seed, protect=protect, **settings)
    return new, plan.model_copy(update={"model": name, "tokens": fingerprint(batch)})


def repeat_plan(model: PreTrainedModel, batch: Tensor, plan: Plan) -> PreTrainedModel:
    """Carry a stored plan of a replacement out again, on the same tokens.

    Raises:
        InputError: Other tokens than the plan's, or another outcome than it names.
    """
    if plan.tokens != fingerprint(batch):
        raise InputError(f"plan: its {plan.method} read other tokens: name the same --data and their number")
    known = settings_of(plan.method)
    told = {key: value for key, value in plan.settings.items() if key in known}
    size, seed = plan.settings.get("size"), plan.settings.get("seed")
    if not isinstance(size, int) or not isinstance(seed, int):
        raise InputError(
            f"plan: its settings lack the whole numbers size and seed, which {plan.method} needs"
        )
    model, again = replace_blocks(
        model, batch, plan.method, drop=size, seed=seed, protect=plan.protect, name=plan.model, **told
    )
    if again != plan:
        raise InputError(f"plan: {plan.method} chooses otherwise here: {again.describe()}: make a new plan")
    return model


def method_plan(
    method: str,
    count: int,
    size: int,
    seed: int,
    protect: str,
    *,
    drop: tuple[int, ...] = (),
    **settings: Any,
) -> Plan:
    """The plan of a replacement: ``size`` blocks asked for, ``drop`` gone, the rest in ``settings``."""
    return Plan(
        num_blocks=count,
        drop=drop,
        protect=protect,
        method=method,
        settings={"size": size, "seed": seed, **settings},
    )
