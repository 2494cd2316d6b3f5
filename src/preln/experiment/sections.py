"""The parts of a study file: data, what is cut and healed, what is asked of the models, hypotheses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Unknown keys are refused, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tokens(Strict):
    """Token windows; see :func:`preln.data.load_tokens`."""

    source: str = "docstrings"
    sequences: int = Field(ge=2)
    length: int = Field(default=128, ge=2)
    split: Literal["train", "validation"] = "train"
    seed: int = Field(default=0, ge=0, lt=2**32)


class Rows(Strict):
    """Instruction or text rows as windows; see :func:`preln.data.load_rows` and ``preln.heal.as_examples``.

    ``rows`` names the source, ``sequences`` the windows taken; ``packed`` lets short rows share a window.
    """

    rows: str
    sequences: int = Field(ge=2)
    length: int = Field(default=256, ge=2)
    split: Literal["train", "validation"] = "train"
    seed: int = Field(default=0, ge=0, lt=2**32)
    template: Literal["auto", "alpaca", "chat"] = "auto"
    supervise: Literal["response", "all"] = "response"
    packed: bool = True


def _form(value: Any) -> str:
    named = "rows" in value if isinstance(value, dict) else isinstance(value, Rows)
    return "by rows" if named else "by tokens"


TokensOrRows = Annotated[
    Annotated[Tokens, Tag("by tokens")] | Annotated[Rows, Tag("by rows")], Discriminator(_form)
]


class Data(Strict):
    """The four sets of tokens; calibration chooses blocks, evaluation only ever measures."""

    calibration: Tokens
    evaluation: Tokens
    healing: TokensOrRows
    healing_validation: TokensOrRows


@dataclass(frozen=True)
class Cut:
    """One pruned model: its name in the study, the criterion, how much goes, what is protected."""

    name: str
    metric: str
    drop: int | float
    protect: str

    def count(self, num_blocks: int) -> int:
        """How many blocks go; a share is rounded to whole blocks, at least one.

        >>> Cut("reverse-0.25", "reverse", 0.25, "none").count(30)
        8
        """
        return self.drop if isinstance(self.drop, int) else max(1, round(self.drop * num_blocks))


class Pruning(Strict):
    """Which criteria choose, how many blocks (or which share of them) go, and which blocks must stay."""

    metrics: tuple[str, ...] = Field(min_length=1)
    drop: tuple[Count | Share, ...] = Field(min_length=1)
    protect: str | tuple[str, ...] = "none"  # several: a pruned model each
    probe: tuple[str, ...] = ()  # pruned models whose gradients are measured, too

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every pruned model of the study, the smaller number of blocks first as listed."""
        several = isinstance(self.protect, tuple)
        presets = self.protect if isinstance(self.protect, tuple) else (self.protect,)
        return tuple(
            Cut(f"{metric}-{drop:g}" + (f"-{preset}" * (several and preset != "none")), metric, drop, preset)
            for drop in self.drop
            for metric in self.metrics
            for preset in presets
        )

    def alike(self) -> dict[str, str]:
        """By criterion, the pruned models of the first number of blocks under the first protection."""
        first = self.cuts[0]
        return {c.metric: c.name for c in self.cuts if (c.drop, c.protect) == (first.drop, first.protect)}


class Healing(Strict):
    """A recipe and the pruned models it heals; several rates or seeds make a grid of runs."""

    recipe: str
    models: tuple[str, ...] = Field(min_length=1)
    label: str | None = None
    learning_rate: Rate | tuple[Rate, ...] | None = None
    seeds: tuple[int, ...] = ()
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(ge=1)
    gradient_accumulation: int | None = Field(default=None, ge=1)
    precision: Literal["bfloat16", "float16"] | None = None
    checkpoint_every: int = Field(default=10, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    keep_weights: bool = True

    @model_validator(mode="after")
    def _check(self) -> Healing:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"{self.recipe}: give either steps or epochs")
        return self

    def settings(self) -> dict[str, Any]:
        """What the entry says of the training, for :meth:`preln.heal.Recipe.settings_for`."""
        names = ("steps", "epochs", "batch_size", "gradient_accumulation", "precision")
        return {name: getattr(self, name) for name in (*names, "checkpoint_every", "eval_every")}

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
    limit: Count | dict[str, Count] | None = None
    models: tuple[str, ...] = Field(min_length=1)

    def limit_of(self, name: str) -> int | None:
        """Documents of one task, of each subject in a group; None: all."""
        return self.limit.get(name) if isinstance(self.limit, dict) else self.limit


class Answers(Strict):
    """Bits a byte of known answers, in groups; see :func:`preln.evaluate.gold_bits`."""

    groups: dict[str, tuple[str, ...]] = Field(min_length=1)
    limit: int = Field(ge=2)
    models: tuple[str, ...] = Field(min_length=1)


class Writing(Strict):
    """Greedy continuations beside the unpruned model's own; see :func:`preln.evaluate.compare_generation`.

    Prompts are the first ``prompt_tokens`` of the first ``prompts`` evaluation windows.
    """

    prompts: int = Field(ge=2)
    prompt_tokens: int = Field(default=32, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    models: tuple[str, ...] = Field(min_length=1)


class Resources(Strict):
    """What one kind of step takes of a cluster; None leaves it to the engine."""

    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)


class Hypothesis(Strict):
    """A statement of the ledger, with the number that decides it, fixed before the run.

    ``direction`` says on which side of ``threshold`` the statistic lies if the statement holds.
    """

    id: str
    statistic: str
    direction: Literal["below", "above"]
    threshold: float
    model: str | None = None  # the pruned model that decides, where the statistic is about one


def healed_name(pruned: str, run: HealRun) -> str:
    """Name of a healed model inside a study, such as ``reverse-8-partial-3``."""
    return f"{pruned}-{run.name}"


def safe_name(name: str) -> bool:
    """Whether a model of a study can be the name of a folder.

    >>> safe_name("reverse-0.25-lora-1e-05-s0"), safe_name("../x")
    (True, False)
    """
    return re.fullmatch(r"[A-Za-z0-9][\w.@+-]*", name, flags=re.ASCII) is not None
