"""Published numbers as data: one file a source, each row a number with what it is of, checked when read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import Field, ValidationError, model_validator

from preln.base.errors import InputError
from preln.base.yaml_files import read_yaml
from preln.experiment.sections import Strict
from preln.heal import get_recipe
from preln.prune import CRITERIA

# what a number is: mean accuracy of the source's tasks; accuracy kept, as a share of the dense model's; share
# of blocks at which the accuracy collapses; share that the source calls safe to remove; healing's seconds, GB
Statistic = Literal["mean_acc", "retention", "collapse_share", "safe_share", "heal_seconds", "heal_memory_gb"]
_UNBOUNDED = ("heal_seconds", "heal_memory_gb")


class Number(Strict):
    """One published number.

    Attributes:
        model: The model, by its hub id where the source says which; else as the source calls it.
        statistic: One of :data:`Statistic`.
        value: The number, or the ends of a range.
        metric: The criterion that chose the blocks, by this project's name; None for the dense model, and
            where the source uses one that is not in the registry (then ``method`` says what).
        variant: The criterion that repeats the source's code, where that differs from its text.
        share: Removed blocks over all blocks; None where the number is about the share itself.
        recipe: The preset that healed it; None: not healed, or not by a preset.
        healed: Whether it was healed; None where that is not known.
        method: A published method as a whole, such as ShortGPT.
        tasks: Accuracies by task.
        note: What else a reader must know.
    """

    model: str
    statistic: Statistic
    value: float | tuple[float, float]
    metric: str | None = None
    variant: str | None = None
    share: float | None = Field(default=None, ge=0, lt=1)
    recipe: str | None = None
    healed: bool | None = False
    method: str | None = None
    tasks: dict[str, float] = Field(default_factory=dict)
    note: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Number:
        ends = self.value if isinstance(self.value, tuple) else (self.value, self.value)
        top = float("inf") if self.statistic in _UNBOUNDED else 1.0
        if not 0 <= ends[0] <= ends[1] <= top:
            raise ValueError(f"value {self.value}: out of range for {self.statistic}")
        if any(not 0 <= value <= 1 for value in self.tasks.values()):
            raise ValueError("tasks: an accuracy is from 0 to 1")
        for name in (self.metric, self.variant):
            if name is not None and name not in CRITERIA:
                raise ValueError(f"metric {name!r}: no criterion of this project: name it under method")
        if self.recipe is not None:
            get_recipe(self.recipe)
            if self.healed is not True:
                raise ValueError(f"recipe {self.recipe!r}: healed must be true")
        return self


class Published(Strict):
    """One source.

    Attributes:
        name: Short name, that of the file.
        source: Authors, year and title.
        confirmed: Whether the numbers stand in the source itself, not in a retelling.
        setting: How they were measured, in plain words.
        caveats: What keeps them from being compared with this project's numbers as they are.
        numbers: The rows.
    """

    schema_version: Literal[1] = 1
    name: str
    source: str
    confirmed: bool
    setting: str
    caveats: tuple[str, ...] = Field(min_length=1)
    numbers: tuple[Number, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Published:
        keys = [(n.model, n.statistic, n.metric, n.method, n.share, n.recipe, n.healed) for n in self.numbers]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"numbers: {twice[0]}, {twice[1]} stands there twice for the same condition")
        return self

    def table(self) -> pd.DataFrame:
        """One row a number: source, confirmed, what it is of, then low, value and high (apart in ranges)."""
        rows = []
        for number in self.numbers:
            low, high = number.value if isinstance(number.value, tuple) else (number.value, number.value)
            own = number.model_dump(exclude={"value", "tasks"})
            rows.append(
                {"source": self.name, "confirmed": self.confirmed, **own}
                | {"low": low, "value": (low + high) / 2, "high": high}
            )
        return pd.DataFrame(rows)


def read_published(path: str | os.PathLike[str]) -> Published:
    """Read one file.

    Raises:
        InputError: No such file, no YAML, an unknown key, criterion or recipe, or a number out of range.
    """
    source = Path(path)
    try:
        values = read_yaml(source)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}): check the path") from error
    try:
        found = Published.model_validate(_tuples(values))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {place}: {message}") from error
    except InputError as error:  # a recipe that is none
        raise InputError(f"{source}: {error}") from error
    if found.name != source.stem:
        raise InputError(f"{source}: name {found.name!r} is not that of the file: make them equal")
    return found


def published_table(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """All numbers of some files, one below the other.

    Raises:
        InputError: See :func:`read_published`; no file at all.
    """
    frames = [read_published(path).table().astype(object) for path in paths]
    if not frames:
        raise InputError("published numbers: no file named: give at least one")
    return pd.concat(frames, ignore_index=True)


def _tuples(value: object) -> object:
    """YAML's lists as tuples, and whole numbers as they are."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
