"""How long, how fast and in what portions a model is trained; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
PRECISIONS = ("bfloat16", "float16")
_COUNTS = ("steps", "batch_size", "gradient_accumulation", "eval_every", "checkpoint_every", "early_stop")


@dataclass(frozen=True)
class TrainingSettings:
    """The budget and the optimizer of one healing run.

    Attributes:
        steps: Optimizer steps; give this or ``epochs``, not both.
        epochs: Passes over the training rows, rounded up to whole steps.
        batch_size: Rows an optimizer step sees, over all accumulated portions.
        gradient_accumulation: Portions that a batch is split into, to save memory; divides ``batch_size``.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear rise; the first step already moves.
        schedule: What follows the warm-up: ``linear`` or ``cosine`` decay to 0, or ``constant``.
        weight_decay: Decoupled decay of AdamW (Loshchilov and Hutter 2019).
        max_grad_norm: Largest Euclidean norm of the whole gradient; None leaves it as it is.
        seed: Fixes the order of the rows, the adapter's initial values and every dropout mask.
        eval_every: Steps between validation losses; None measures at the start and the end only.
        checkpoint_every: Steps between checkpoints, where a folder for them is given; None makes none.
        select: ``last`` keeps the final weights; ``best`` those of the lowest validation loss.
        optimizer: ``adamw``, or ``paged_adamw_8bit`` of bitsandbytes (see
            :func:`preln.heal.training.optimizers.make_optimizer`).
        gradient_checkpointing: Whether the blocks' inner states are computed again in the backward pass
            instead of stored.
        precision: Dtype that matrix products are computed in, by autocast; None: that of the weights.
        early_stop: Validation losses in a row without a new lowest after which the run ends; None goes on to
            the last step.

    >>> TrainingSettings(steps=10, learning_rate=1e-3, warmup_steps=2, schedule="constant").rate(0)
    0.0005
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = 10
    select: str = "last"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    precision: str | None = None
    early_stop: int | None = None

    def __post_init__(self) -> None:
        """Check every field by itself.

        Raises:
            InputError: A field is out of range; the line names it.
        """
        if (self.steps is None) == (self.epochs is None):
            raise InputError(f"steps={self.steps}, epochs={self.epochs}: give exactly one of the two")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 1):
                raise InputError(f"{name}={value!r}: must be a whole number of at least 1")
        for name in ("warmup_steps", "seed"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 0):
                raise InputError(f"{name}={value!r}: must be a whole number of at least 0")
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (is_real(value) and value > 0):
                raise InputError(f"{name}={value!r}: must be a positive number")
        if not (is_real(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay={self.weight_decay!r}: must not be negative")
        choices = {"schedule": SCHEDULES, "select": ("last", "best"), "optimizer": OPTIMIZERS}
        if self.precision is not None:
            choices["precision"] = PRECISIONS
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not isinstance(self.gradient_checkpointing, bool):
            raise InputError(f"gradient_checkpointing={self.gradient_checkpointing!r}: must be True or False")
        if self.early_stop is not None and self.eval_every is None:
            raise InputError(f"early_stop={self.early_stop}: needs validation on the way: give eval_every")
        if self.batch_size % self.gradient_accumulation:
            raise InputError(
                f"gradient_accumulation={self.gradient_accumulation}: must divide "
                f"batch_size={self.batch_size}"
            )
        if self.steps is not None:
            self._check_warmup(self.steps)

    def _check_warmup(self, steps: int) -> None:
        if self.warmup_steps > steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps}: longer than the {steps} steps of the run: give a smaller "
                "warmup_steps or more steps"
            )

    def replaced(self, **overrides: Any) -> TrainingSettings:
        """These settings with every override that is not None; giving ``steps`` unsets ``epochs``, and so on.

        Raises:
            InputError: A name that is no setting, or a value out of range.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        known = {field.name for field in dataclasses.fields(self)}
        for name in given:
            if name not in known:
                raise InputError(f"{name}: not a training setting: choose from {', '.join(sorted(known))}")
        if "steps" in given and "epochs" not in given:
            given["epochs"] = None
        if "epochs" in given and "steps" not in given:
            given["steps"] = None
        return dataclasses.replace(self, **given)

    def resolved(self, rows: int) -> TrainingSettings:
        """The settings for ``rows`` training rows: epochs turned into steps, and no batch beyond the rows.

        Raises:
            InputError: The warm-up is longer than the run.
        """
        portions = self.gradient_accumulation
        batch = min(self.batch_size, rows)
        # a clamped batch may no longer divide into the portions asked for: take the nearest lower divisor
        portions = next(count for count in range(min(portions, batch), 0, -1) if batch % count == 0)
        steps = self.steps if self.epochs is None else math.ceil(rows * self.epochs / batch)
        return dataclasses.replace(
            self, steps=steps, epochs=None, batch_size=batch, gradient_accumulation=portions
        )

    def rate(self, step: int) -> float:
        """Learning rate of update number ``step``, counted from 0.

        With w warm-up steps of n: ``peak (step + 1) / w`` below w; then, with ``t = (step - w) / (n - w)``,
        ``peak (1 - t)``, ``peak (1 + cos(pi t)) / 2`` or ``peak``.

        Raises:
            InputError: The settings still count in epochs (see :meth:`resolved`).
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.steps is None:
            raise InputError(f"epochs={self.epochs}: resolve the settings for a number of rows first")
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_whole(value: object) -> bool:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a finite number and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
