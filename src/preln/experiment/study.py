"""A study as data: model, tokens, what is cut and healed, and the hypotheses fixed before anything runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from preln.base.errors import InputError
from preln.base.files import write_text

DENSE = "dense"
Rate = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Unknown keys are refused, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tokens(Strict):
    """Token windows; see :func:`preln.data.load_tokens`."""

    source: str = "docstrings"
    sequences: int = Field(ge=2)
    length: int = Field(default=128, ge=2)
    split: Literal["train", "validation"] = "train"
    seed: int = 0


class Data(Strict):
    """The four sets of tokens; calibration chooses blocks, evaluation only ever measures."""

    calibration: Tokens
    evaluation: Tokens
    healing: Tokens
    healing_validation: Tokens


class Pruning(Strict):
    """Which criteria choose, and how many blocks go."""

    metrics: tuple[str, ...] = Field(min_length=1)
    drop: tuple[int, ...] = Field(min_length=1)
    protect: str = "none"
    probe: tuple[str, ...] = ()  # pruned models whose gradients are measured, too


class Healing(Strict):
    """A recipe and the pruned models it heals; several rates or seeds make a grid of runs."""

    recipe: str
    models: tuple[str, ...] = Field(min_length=1)
    label: str | None = None
    learning_rate: Rate | tuple[Rate, ...] | None = None
    seeds: tuple[int, ...] = ()
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    checkpoint_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    keep_weights: bool = True

    def runs(self, seed: int) -> tuple[HealRun, ...]:
        """The single runs, every rate with every seed; ``seed`` is the study's, where none is named."""
        rates = self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)
        found = []
        for rate in rates:
            group = self.label or self.recipe
            group += f"-{rate:g}" if len(rates) > 1 else ""
            for own in self.seeds or (seed,):
                name = f"{group}-s{own}" if len(self.seeds) > 1 else group
                found.append(HealRun(self, name, group, rate, own))
        return tuple(found)


@dataclass(frozen=True)
class HealRun:
    """One run of a healing entry.

    Attributes:
        entry: The entry it belongs to.
        name: What the run is called in step folders and tables.
        group: The same without the seed: runs of one group are averaged.
        learning_rate: Its rate, or None for the recipe's.
        seed: Fixes the order of the rows and an adapter's initial values.
    """

    entry: Healing
    name: str
    group: str
    learning_rate: float | None
    seed: int

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.entry.recipe

    @property
    def models(self) -> tuple[str, ...]:
        """The pruned models it heals."""
        return self.entry.models


class Tasks(Strict):
    """lm-eval tasks, and which models sit them."""

    names: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    models: tuple[str, ...] = Field(min_length=1)


class Hypothesis(Strict):
    """A statement of the ledger, with the number that decides it, fixed before the run.

    ``direction`` says on which side of ``threshold`` the statistic lies if the statement holds.
    """

    id: str
    statistic: str
    direction: Literal["below", "above"]
    threshold: float
    model: str | None = None  # the pruned model that decides, where the statistic is about one


class Study(Strict):
    """A whole study."""

    schema_version: Literal[1] = 1
    name: str
    question: str
    model: str
    device: str = "cpu"
    device_map: Literal["auto", "none"] = "none"  # auto spreads the model over all devices, to measure it
    dtype: str = "float32"
    seed: int = 0
    theory: Literal["quick", "full", "none"] = "quick"
    data: Data
    prune: Pruning
    heal: tuple[Healing, ...] = ()
    tasks: Tasks | None = None
    hypotheses: tuple[Hypothesis, ...] = ()

    @property
    def heal_runs(self) -> tuple[HealRun, ...]:
        """The single healing runs, in the order of their entries."""
        return tuple(run for entry in self.heal for run in entry.runs(self.seed))

    @model_validator(mode="after")
    def _check(self) -> Study:
        pruned = {pruned_name(metric, n) for metric in self.prune.metrics for n in self.prune.drop}
        if len(pruned) < len(self.prune.metrics) * len(self.prune.drop):
            raise ValueError("prune: a metric or a number of blocks is named twice")
        for name in self.prune.probe:
            if name not in pruned:
                raise ValueError(f"prune.probe: {name!r} is none of the pruned models {sorted(pruned)}")
        healed: dict[str, bool] = {}
        for run in self.heal_runs:
            for name in run.models:
                if name not in pruned:
                    raise ValueError(f"heal: {name!r} is none of the pruned models {sorted(pruned)}")
                if (whole := healed_name(name, run)) in healed:
                    raise ValueError(f"heal: {whole!r} would run twice: give one of them a label")
                healed[whole] = run.entry.keep_weights
        for name in self.tasks.models if self.tasks else ():
            if name not in pruned | set(healed) | {DENSE}:
                raise ValueError(f"tasks: {name!r} is no model of this study")
            if not healed.get(name, True):
                raise ValueError(f"tasks: the weights of {name!r} are not kept: set keep_weights: true")
        if self.device_map != "none" and self.heal:
            raise ValueError(
                "device_map: a model that is spread over devices is measured, not healed: "
                "take heal out of the study, or heal with `preln heal --shard on`"
            )
        decided = [(h.id, h.model) for h in self.hypotheses]
        if len(set(decided)) < len(decided):
            raise ValueError("hypotheses: one is listed twice: name another model for one of them")
        for hypothesis in self.hypotheses:
            if hypothesis.model is not None and hypothesis.model not in pruned:
                raise ValueError(
                    f"hypotheses: {hypothesis.model!r} is none of the pruned models {sorted(pruned)}"
                )
        return self


def pruned_name(metric: str, drop: int) -> str:
    """Name of a pruned model inside a study, such as ``reverse-8``."""
    return f"{metric}-{drop}"


def healed_name(pruned: str, run: HealRun) -> str:
    """Name of a healed model inside a study, such as ``reverse-8-partial-3``."""
    return f"{pruned}-{run.name}"


def _first_problem(error: ValidationError) -> str:
    """One line for the first thing that a validation found, with the place and the mend."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key: remove it or mend its name"
    if problem["type"] == "missing":
        return f"{place}: missing: add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Raises:
        InputError: No such file, no YAML, an unknown key, a value out of range, a criterion, a recipe or a
            hypothesis that nothing here knows.
    """
    from preln.experiment.statistics.verdicts import STATISTICS
    from preln.heal import get_recipe
    from preln.prune.registry import choose_metrics

    source = Path(path)
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file: check the path of the study") from error
    except IsADirectoryError as error:
        raise InputError(f"{source}: is a folder: name the study's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"{source}: not a study: a mapping with name, model, data, … is expected")
    try:
        study = Study.model_validate(_lists_to_tuples(values))
    except ValidationError as error:
        raise InputError(f"{source}: {_first_problem(error)}") from error
    try:
        choose_metrics(study.prune.metrics)
        for entry in study.heal:
            get_recipe(entry.recipe)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    for hypothesis in study.hypotheses:
        known = STATISTICS.get(hypothesis.id)
        if known is None:
            ids = ", ".join(sorted(STATISTICS))
            raise InputError(f"{source}: hypotheses: {hypothesis.id} cannot be decided: use one of {ids}")
        if hypothesis.statistic not in known:
            raise InputError(
                f"{source}: hypotheses: {hypothesis.id} has no statistic {hypothesis.statistic!r}: "
                f"use one of {', '.join(sorted(known))}"
            )
        if hypothesis.model is not None and not known[hypothesis.statistic].of_model:
            raise InputError(
                f"{source}: hypotheses: {hypothesis.statistic} is not about one pruned model: leave model out"
            )
    return study


def _lists_to_tuples(value: Any) -> Any:
    """YAML's lists as tuples, which frozen models hold."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def study_text(study: Study) -> str:
    """The resolved study as YAML, every default spelt out."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def write_study(study: Study, path: str | os.PathLike[str]) -> Path:
    """Write the resolved study as YAML, atomically."""
    return write_text(path, study_text(study))
