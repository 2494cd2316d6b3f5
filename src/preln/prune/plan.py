"""What to remove and why, as pure data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from preln.base.errors import InputError
from preln.base.files import write_text
from preln.base.yaml_files import read_yaml
from preln.models import check_drop
from preln.models.layers import parse_layers, sort_halves

__all__ = ["PRESETS", "REMOVE", "Plan", "make_plan", "parse_layers", "plan_layers", "plan_text",
           "protected_blocks", "read_plan", "write_plan"]  # fmt: skip

# blocks that are never removed, by the number of blocks; the sources are in the project's field table
PRESETS: dict[str, Callable[[int], set[int]]] = {
    "none": lambda n: set(),
    "uidl": lambda n: {n - 1},
    "sleb": lambda n: {0, n - 1},
    "shortened-plus": lambda n: {i for i in (0, 1, 2, 3, n - 2, n - 1) if 0 <= i < n},
    "finercut": lambda n: set(range(math.ceil(0.4 * n))),
}


REMOVE = "remove"
MOST_BLOCKS = 100_000
Setting = int | float | str | tuple[int, ...]
# keys of a plan that are left out of its file where they say nothing
_OPTIONAL: dict[str, Any] = {"drop_attention": (), "drop_mlp": (), "method": REMOVE, "settings": {}}


class Plan(BaseModel):
    """Which blocks, or halves of blocks, of which model go, and on what grounds. Blocks are counted from 0.

    Attributes:
        model: Name of the source model, if known.
        num_blocks: Its number of blocks.
        drop: Blocks that go, ascending.
        metric: The criterion, or None for blocks named by hand.
        scores: One score a block under that criterion, or None.
        protect: Name of the protection preset.
        tokens: Fingerprint of the tokens scored on, or None.
        drop_attention: Blocks whose attention alone goes, ascending.
        drop_mlp: Blocks whose MLP alone goes, ascending.
        method: ``remove``, or the replacement that makes up for the blocks that go.
        settings: Everything that the replacement was told, and what it chose, as plain values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    num_blocks: int = Field(le=MOST_BLOCKS)
    drop: tuple[int, ...]
    metric: str | None = None
    scores: tuple[float, ...] | None = None
    protect: str = "none"
    tokens: str | None = None
    drop_attention: tuple[int, ...] = ()
    drop_mlp: tuple[int, ...] = ()
    method: str = REMOVE
    settings: dict[str, Setting] = Field(default_factory=dict)

    @field_validator("settings", mode="before")
    @classmethod
    def _plain(cls, settings: Any) -> Any:
        """Whole numbers as such and keys in order, so that equal plans are equal bytes."""
        if not isinstance(settings, dict) or any(isinstance(v, bool) for v in settings.values()):
            raise ValueError("settings are a mapping of numbers, words and lists of blocks")
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in settings.items()}
        return dict(sorted(whole.items(), key=lambda item: str(item[0])))

    @model_validator(mode="after")
    def _check(self) -> Plan:
        halves = self.drop_attention + self.drop_mlp
        nothing_whole = not self.drop and (bool(halves) or self.method != REMOVE)
        if not nothing_whole and tuple(check_drop(self.drop, self.num_blocks)) != self.drop:
            raise ValueError(f"drop {list(self.drop)}: list the blocks in ascending order")
        self._check_halves()
        if self.method != REMOVE and halves:
            raise ValueError(f"method {self.method!r}: works on whole blocks: leave the halves out")
        if self.method == REMOVE and self.settings:
            raise ValueError("settings: removal has none: name the method that they are for")
        spared = sorted({*self.drop, *halves} & protected_blocks(self.protect, self.num_blocks))
        if spared:
            raise ValueError(f"block {spared[0]} is protected by {self.protect!r}: leave it in")
        if self.scores is not None and len(self.scores) != self.num_blocks:
            raise ValueError(f"{len(self.scores)} scores for {self.num_blocks} blocks: give one a block")
        return self

    def _check_halves(self) -> None:
        """Halves are of blocks that remain, named once, in order, and something remains."""
        for name, blocks in (("drop_attention", self.drop_attention), ("drop_mlp", self.drop_mlp)):
            if not blocks:
                continue
            if sorted(set(blocks)) != list(blocks):
                raise ValueError(f"{name} {list(blocks)}: list every block once, in ascending order")
            if not 0 <= blocks[0] <= blocks[-1] < self.num_blocks:
                raise ValueError(
                    f"{name} {list(blocks)}: out of range: there are blocks 0 to {self.num_blocks - 1}"
                )
            twice = sorted(set(blocks) & set(self.drop))
            if twice:
                raise ValueError(f"block {twice[0]} goes as a whole: do not list its halves as well")
        if set(self.drop_attention) & set(self.drop_mlp) >= set(self.keep):
            raise ValueError(f"all {self.num_blocks} blocks would be removed: keep at least one half")

    @property
    def keep(self) -> tuple[int, ...]:
        """The blocks that remain."""
        return tuple(i for i in range(self.num_blocks) if i not in set(self.drop))

    def describe(self) -> str:
        """One line: which blocks go and what remains."""
        kept = _listed(self.keep)
        gone = f"removes {len(self.drop)} of {self.num_blocks} blocks, counted from 0: {_listed(self.drop)}"
        halves = [
            f"removes the {kind} of {_listed(blocks)}"
            for kind, blocks in (("attention", self.drop_attention), ("MLP", self.drop_mlp))
            if blocks
        ]
        if self.method != REMOVE:
            told = ", ".join(
                f"{k}={_listed(v) if isinstance(v, tuple) else v}" for k, v in self.settings.items()
            )
            halves.append(f"by {self.method} ({told})")
        return "; ".join(
            [gone if self.drop or not halves else "removes no whole block", *halves, f"keeps {kept}"]
        )


def _listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks))


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
    layers: Iterable[int | str], num_blocks: int, *, protect: str = "none", model: str | None = None
) -> Plan:
    """A plan for blocks, and halves of blocks, named by hand as :func:`parse_layers` gives them.

    Raises:
        InputError: Out of range, twice, all, or protected blocks.
    """
    found = sort_halves(layers)
    halves = {name: tuple(sorted(found[name])) for name in ("drop_attention", "drop_mlp")}
    drop = tuple(check_drop(found["drop"], num_blocks)) if found["drop"] or not any(halves.values()) else ()
    values = {"model": model, "num_blocks": num_blocks, "drop": drop, "protect": protect, **halves}
    return _validated(values, "layers")


def plan_text(plan: Plan) -> str:
    """The plan as YAML; equal plans give equal bytes."""
    values = {k: _as_yaml(v) for k, v in plan.model_dump().items() if k not in _OPTIONAL or v != _OPTIONAL[k]}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def _as_yaml(value: Any) -> Any:
    """Tuples as lists, also inside the settings."""
    if isinstance(value, dict):
        return {key: _as_yaml(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


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
        values = read_yaml(source)
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read as YAML: {error.strerror}") from error
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
