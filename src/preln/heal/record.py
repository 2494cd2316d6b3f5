"""What a healing run leaves behind: the model, its table, and a manifest that says how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from preln.heal.options.recipe import Recipe
from preln.heal.options.settings import TrainingSettings
from preln.heal.preparing.prepare import Prepared, finish, prepare
from preln.heal.rows.examples import Examples
from preln.heal.training.loop import Fit
from preln.heal.training.step import Stepper
from preln.models import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ["step", "tokens", "seconds", "split", "loss", "learning_rate"]


@dataclass
class HealResult:
    """A healed model and how it came about.

    Attributes:
        model: A plain model in evaluation mode, adapters merged. After a sharded run process 0 has it; in the
            others it is on the meta device, without weights.
        history: The columns of ``COLUMNS``; ``train`` rows hold a batch's loss before that update.
        trained: The trained tensors by name; :func:`apply_trained` makes the model from them
            again. After a sharded run process 0 has them.
        manifest: Recipe, settings, counts, losses, fingerprints, provenance; plain data.
        adapter_config: peft's configuration, or None.
    """

    model: PreTrainedModel
    history: pd.DataFrame
    trained: dict[str, Tensor]
    manifest: dict[str, Any]
    adapter_config: Any = None


def identity_of(
    recipe: Recipe,
    settings: TrainingSettings,
    examples: Examples,
    held_out: Examples | None,
    *,
    device: torch.device,
    cache: dict[str, Any] | None,
    teacher: PreTrainedModel | None,
    drop: Sequence[int] | None,
    fingerprint: str,
) -> dict[str, Any]:
    """What a run's outcome depends on, as plain data: a checkpoint continues runs of the same identity only.

    The number of processes and whether the blocks are sharded are no part of it.
    """
    numerics = {"torch": torch.__version__, "device": device.type}
    if cache is not None:
        numerics["cache"] = cache["dtype"]
    found = {
        "recipe": recipe.described(),
        # how often a run is stored does not change what it computes
        "settings": {k: v for k, v in asdict(settings).items() if k != "checkpoint_every"},
        "model": {"sha256": fingerprint},
        "data": {
            "train": examples.fingerprint(),
            "validation": None if held_out is None else held_out.fingerprint(),
        },
        "numerics": numerics,
    }
    if recipe.teacher and teacher is not None:
        found["teacher"] = {"sha256": model_fingerprint(teacher), "drop": list(drop or ())}
    return found


def outcome_of(prepared: Prepared, outcome: Fit, passes: Stepper, history: pd.DataFrame) -> dict[str, Any]:
    """What a run took and what it led to. ``seconds`` counts the updates, not validation and checkpoints.

    ``held_bytes`` are the weights and the optimizer's state that this process held at the end.
    """
    return {
        "trainable_parameters": sum(p.numel() for p in prepared.parameters.values()),
        "total_parameters": sum(p.numel() for p in prepared.model.parameters()),
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "supervised_tokens": outcome.progress.supervised,
        "seconds": outcome.progress.seconds,
        "portion": passes.portion,
        "processes": passes.workers.count,
        "sharded": prepared.sharded,
        "held_bytes": outcome.held_bytes,
        **_losses(outcome, history),
        "dtype": str(next(iter(prepared.parameters.values())).dtype).removeprefix("torch."),
        "head_untied": prepared.head_untied,
        "notes": prepared.notes,
    }


def apply_trained(
    model: PreTrainedModel,
    recipe: str | Recipe,
    tensors: Mapping[str, Tensor],
    *,
    drop: Sequence[int] | None = None,
) -> PreTrainedModel:
    """The healed model, from the model that was healed and its trained tensors; equal to the last bit.

    Args:
        model: The model as it was before healing; left as it is.
        recipe: The recipe that it was healed with.
        tensors: ``HealResult.trained``.
        drop: As it was healed with.

    Raises:
        InputError: The tensors do not belong to this model and recipe.
    """
    prepared = prepare(model, recipe, drop=drop)
    prepared.load(tensors)
    return finish(prepared)


def _losses(outcome: Fit, history: pd.DataFrame) -> dict[str, Any]:
    """Validation losses before healing and of the weights that were kept; None where none was measured."""
    measured = history.loc[history["split"] == "validation"].set_index("step")["loss"]
    return {
        "loss_before": float(measured.iloc[0]) if len(measured) else None,
        "loss_after": float(measured.loc[outcome.selected_step]) if len(measured) else None,
        "selected_step": outcome.selected_step,
        "best_step": outcome.progress.best_step,
        "best_loss": outcome.progress.best_loss,
    }
