"""What to remove and why, as pure data."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from preln.base.errors import InputError
from preln.base.files import write_text
from preln.models import check_drop

# blocks that are never removed, by the number of blocks; the sources are in the project's field table
PRESETS: dict[str, Callable[[int], set[int]]] = {
    "none": lambda n: set(),
    "uidl": lambda n: {n - 1},
    "sleb": lambda n: {0, n - 1},
    "shortened-plus": lambda n: {i for i in (0, 1, 2, 3, n - 2, n - 1) if 0 <= i < n},
    "finercut": lambda n: set(range(math.ceil(0.4 * n))),
}


class Plan(BaseModel):
    """Which blocks of which model go, and on what grounds. Blocks are counted from 0.

    Attributes:
        model: Name of the source model, if known.
        num_blocks: Its number of blocks.
        drop: Blocks to remove, ascending.
        metric: The criterion, or None for blocks named by hand.
        scores: One score a block under that criterion, or None.
        protect: Name of the protection preset.
        tokens: Fingerprint of the tokens scored on, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    num_blocks: int
    drop: tuple[int, ...]
    metric: str | None = None
    scores: tuple[float, ...] | None = None
    protect: str = "none"
    tokens: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if tuple(check_drop(self.drop, self.num_blocks)) != self.drop:
            raise ValueError(f"drop {list(self.drop)}: list the blocks in ascending order")
        spared = sorted(set(self.drop) & protected_blocks(self.protect, self.num_blocks))
        if spared:
            raise ValueError(f"block {spared[0]} is protected by {self.protect!r}: leave it in")
        if self.scores is not None and len(self.scores) != self.num_blocks:
            raise ValueError(f"{len(self.scores)} scores for {self.num_blocks} blocks: give one a block")
        return self

    @property
    def keep(self) -> tuple[int, ...]:
        """The blocks that remain."""
        return tuple(i for i in range(self.num_blocks) if i not in set(self.drop))

    def describe(self) -> str:
        """One line: which blocks go and what remains."""
        gone, kept = ", ".join(map(str, self.drop)), ", ".join(map(str, self.keep))
        return f"removes {len(self.drop)} of {self.num_blocks} blocks, counted from 0: {gone}; keeps {kept}"


def protected_blocks(preset: str, num_blocks: int) -> set[int]:
    """Blocks that a preset keeps.

    Raises:
        InputError: An unknown preset.

    >>> sorted(protected_blocks("sleb", 12))
    [0, 11]
    """
    if preset not in PRESETS:
        raise InputError(f"protection preset {preset!r} is unknown: choose from {', '.join(PRESETS)}")
    return PRESETS[preset](num_blocks)


def parse_layers(text: str) -> list[int]:
    """Blocks named as ``3,4,20-23``; ranges are half-open, so that is 3, 4, 20, 21, 22.

    Raises:
        InputError: Anything but whole numbers and ascending ranges, or a block named twice.

    >>> parse_layers("3,4,20-23")
    [3, 4, 20, 21, 22]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, flags=re.ASCII)
        if match is None:
            raise InputError(f"layers {text!r}: {part.strip()!r} is neither a block nor a range a-b")
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if stop <= start:
            raise InputError(f"layers {text!r}: the range {part.strip()} is empty: a-b ends before b")
        if stop - start > 100_000:
            raise InputError(f"layers {text!r}: no model has {stop - start} blocks in a range")
        found.extend(range(start, stop))
    twice = sorted({i for i in found if found.count(i) > 1})
    if twice:
        raise InputError(f"layers {text!r}: block {twice[0]} is named twice: name each block once")
    return sorted(found)


def make_plan(
    scores: pd.DataFrame,
    metric: str,
    *,
    drop: int,
    protect: str = "none",
    tokens: str | None = None,
    model: str | None = None,
) -> Plan:
    """Remove the ``drop`` blocks of lowest rank under ``metric`` that are not protected.

    Args:
        scores: Table of :func:`preln.prune.score`.
        metric: One of its metrics.
        drop: How many blocks to remove.
        protect: Name of a preset.
        tokens: Fingerprint of the tokens that were scored on.
        model: Name of the source model.

    Raises:
        InputError: A metric without scores, or more blocks to drop than may go.
    """
    mine = scores.loc[scores["metric"] == metric].sort_values(by="rank")
    if mine.empty:
        have = ", ".join(scores["metric"].unique())
        raise InputError(f"metric {metric!r} has no scores here: choose from {have}")
    count = len(mine)
    spared = protected_blocks(protect, count)
    order = [int(layer) for layer in mine["layer"] if int(layer) not in spared]
    if isinstance(drop, bool) or not isinstance(drop, int) or drop < 1:
        raise InputError(f"drop {drop}: remove at least one block")
    if drop >= count:
        raise InputError(f"drop {drop} of {count} blocks: at least one must remain")
    if drop > len(order):
        raise InputError(f"drop {drop}: protection {protect!r} leaves only {len(order)} blocks to remove")
    by_layer = mine.sort_values(by="layer")["score"]
    return Plan(
        model=model,
        num_blocks=count,
        drop=tuple(sorted(order[:drop])),
        metric=metric,
        scores=tuple(float(v) for v in by_layer),
        protect=protect,
        tokens=tokens,
    )


def plan_layers(
    layers: Iterable[int], num_blocks: int, *, protect: str = "none", model: str | None = None
) -> Plan:
    """A plan for blocks named by hand.

    Raises:
        InputError: Out of range, twice, all, or protected blocks.
    """
    drop = tuple(check_drop(layers, num_blocks))
    return _validated({"model": model, "num_blocks": num_blocks, "drop": drop, "protect": protect}, "layers")


def plan_text(plan: Plan) -> str:
    """The plan as YAML; equal plans give equal bytes."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in plan.model_dump().items()}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write the plan as YAML, atomically."""
    return write_text(path, plan_text(plan))


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan.

    Raises:
        InputError: A missing file, no YAML mapping, an unknown key, or blocks that make no sense.
    """
    source = Path(path)
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{source}: cannot be read as YAML: {first}") from error
    if not isinstance(values, dict):
        raise InputError(f"{source}: not a mapping: a plan has keys {', '.join(Plan.model_fields)}")
    return _validated(values, str(source))


def _validated(values: dict, where: str) -> Plan:
    """Build a plan; the first thing wrong with it becomes one line."""
    try:
        return Plan(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "plan"
        if first["type"] == "extra_forbidden":
            known = ", ".join(Plan.model_fields)
            raise InputError(f"{where}: unknown key {place!r}: a plan has keys {known}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {place}: {message}") from error
    except TypeError as error:
        raise InputError(f"{where}: keys of a plan are words: {error}") from error
