"""A placement study as data: sizes, tokens, one schedule for all placements, the contrasts that decide."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from preln.base.errors import InputError
from preln.experiment.sections import Rate, Strict, Tokens
from preln.experiment.study import Study
from preln.experiment.study_file import first_problem, read_mapping, read_study

Placement = Literal["pre", "post", "sandwich", "scaled"]
Order = Literal["deepest", "block_influence"]
ORDERS: tuple[Order, ...] = ("deepest", "block_influence")
PROFILES = ("grad_hidden", "grad_param")
ALIKE = ("angular_distance", "block_influence")


class Sizes(Strict):
    """Sizes and initial values that all placements share; the vocabulary is that of bytes."""

    num_hidden_layers: int = Field(ge=2)
    hidden_size: int = Field(ge=2)
    num_attention_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    branch_gain: Rate = 1.0  # of initial values, see :func:`preln.models.scratch.initialise`

    @model_validator(mode="after")
    def _check(self) -> Sizes:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: {self.hidden_size} is not a multiple of twice {self.num_attention_heads} heads"
            )
        return self


class Training(Strict):
    """AdamW with a linear warm-up and a cosine decay to a tenth, the same for every placement."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: Rate
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(default=0.1, ge=0)  # on matrices, not on gains
    clip: Rate = 1.0
    eval_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)


class PlacementData(Strict):
    """Training text; validation for the loss curve; calibration chooses blocks; evaluation only measures."""

    training: Tokens
    validation: Tokens
    calibration: Tokens
    evaluation: Tokens


class Contrast(Strict):
    """A number of the models of one placement, less that of another's of the same seed, fixed before the run.

    ``quantity`` is one of :func:`quantities`; ``against`` may be left out: then the number itself decides.
    """

    id: Literal["HYP-PLACEMENT"]
    quantity: str
    state: Literal["initial", "trained"] = "trained"
    of: Placement
    against: Placement | None = None
    direction: Literal["below", "above"]
    threshold: float

    @property
    def name(self) -> str:
        """What the contrast is called in tables."""
        compared = self.of if self.against is None else f"{self.of} minus {self.against}"
        return f"{compared}: {self.quantity}, {self.state}"


class PlacementStudy(Strict):
    """Models trained from scratch that differ only in where their norms sit."""

    schema_version: Literal[1] = 1
    kind: Literal["placement"]
    name: str
    question: str
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0  # of intervals inside a measurement; the models' own are ``seeds``
    theory: Literal["none"] = "none"
    placements: tuple[Placement, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    sizes: Sizes
    data: PlacementData
    training: Training
    rises: tuple[Rate, ...] = Field(default=(0.1, 0.5), min_length=1)  # nats a pruned model may lose
    hypotheses: tuple[Contrast, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PlacementStudy:
        for name, values in (("placements", self.placements), ("seeds", self.seeds), ("rises", self.rises)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one is named twice")
        if self.training.warmup_steps >= self.training.steps:
            raise ValueError("training.warmup_steps: not below training.steps: the rate never falls")
        known = quantities(self.rises)
        for contrast in self.hypotheses:
            if contrast.quantity not in known:
                raise ValueError(
                    f"hypotheses: no quantity {contrast.quantity!r}: use one of {', '.join(known)}"
                )
            if contrast.state == "initial" and contrast.quantity.startswith("prunable_"):
                raise ValueError(f"hypotheses: {contrast.quantity}: only a trained model is pruned")
            for placement in (contrast.of, contrast.against):
                if placement is not None and placement not in self.placements:
                    raise ValueError(f"hypotheses: {placement!r} is none of the study's placements")
            if contrast.of == contrast.against:
                raise ValueError(f"hypotheses: {contrast.of!r} is compared with itself")
        names = [contrast.name for contrast in self.hypotheses]
        if len(set(names)) < len(names):
            raise ValueError("hypotheses: one is listed twice")
        return self


def quantities(rises: tuple[float, ...]) -> list[str]:
    """Names of all numbers that a placement study takes of a model.

    >>> quantities((0.1,))[:3]
    ['grad_hidden_spearman', 'grad_hidden_log_ratio', 'grad_param_spearman']
    >>> quantities((0.1,))[-2:]
    ['prunable_block_influence_0.1', 'prunable_block_influence_keep_last_0.1']
    """
    found = [f"{profile}_{kind}" for profile in PROFILES for kind in ("spearman", "log_ratio")]
    found += [f"{measure}_deep_minus_shallow" for measure in ALIKE]
    return found + [prunable(order, kept, rise) for rise in rises for order in ORDERS for kept in (0, 1)]


def prunable(order: str, last_kept: bool | int, rise: float) -> str:
    """Name of a prunable depth.

    >>> prunable("deepest", True, 0.5)
    'prunable_deepest_keep_last_0.5'
    """
    return f"prunable_{order}_{'keep_last_' if last_kept else ''}{rise:g}"


def read_any_study(path: str | os.PathLike[str]) -> Study | PlacementStudy:
    """Read a study file of either kind: with ``kind: placement``, or without a kind.

    Raises:
        InputError: See :func:`preln.experiment.read_study`; or an unknown key, a value out of range, a
            contrast of what the study does not have.
    """
    source = Path(path)
    values = read_mapping(source)
    if values.get("kind") != "placement":
        return read_study(source)
    try:  # by way of JSON, whose lists may be tuples
        return PlacementStudy.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error)}") from error
