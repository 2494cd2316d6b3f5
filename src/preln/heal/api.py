"""Healing from the outside: train a copy of a pruned model, rebuild it from its trained tensors."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.base.memory import peak_bytes, reset_peak
from preln.base.provenance import provenance
from preln.heal.cache import Cache
from preln.heal.examples import Examples, as_examples
from preln.heal.isolation import isolates
from preln.heal.loop import Fit, fit
from preln.heal.prefix import Prefix
from preln.heal.prepare import Prepared, finish, prepare
from preln.heal.recipes import Recipe, get_recipe
from preln.heal.save import check_target, save_healed
from preln.heal.settings import TrainingSettings
from preln.heal.step import Stepper
from preln.heal.teacher import Teacher
from preln.heal.workers import Workers
from preln.models import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Examples | Tensor | Sequence[Mapping[str, Any]]
COLUMNS = ["step", "tokens", "seconds", "split", "loss", "learning_rate"]


@dataclass
class HealResult:
    """A healed model and how it came about.

    Attributes:
        model: A plain model in evaluation mode, adapters merged.
        history: The columns of ``COLUMNS``; ``train`` rows hold a batch's loss before that update.
        trained: The trained tensors by name; :func:`apply_trained` makes the model from them again.
        manifest: Recipe, settings, counts, losses, fingerprints, provenance; plain data.
        adapter_config: peft's configuration, or None.
    """

    model: PreTrainedModel
    history: pd.DataFrame
    trained: dict[str, Tensor]
    manifest: dict[str, Any]
    adapter_config: Any = None


def train(
    model: PreTrainedModel,
    tokens: Rows,
    *,
    validation: Rows | None = None,
    recipe: str | Recipe = "partial-3",
    settings: TrainingSettings | None = None,
    directory: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    cache: Cache | None = None,
    teacher: PreTrainedModel | None = None,
    drop: Sequence[int] | None = None,
    packed: bool = True,
    template: str | None = None,
) -> HealResult:
    """Heal a copy of ``model``; the model itself is left as it is.

    Args:
        model: A causal language model of transformers, as a rule a pruned one.
        tokens: Token ids ``[n, T]``, or rows (see :func:`preln.heal.examples.as_examples`).
        validation: The same kinds of data, held out; measured, never trained on.
        recipe: Name or recipe.
        settings: Budget and optimizer; the recipe's own if None.
        directory: Folder for this run's checkpoints. A run that was stopped continues from there, on the CPU
            to the same weights, bit for bit. It is the caller's to remove once the result is stored.
        tokenizer: Needed for rows of text.
        on_row: Called with each row of the history as it is made.
        cache: Where the states in front of the blocks that train are kept, so that they are computed once
            (HEAL-PREFIX); None computes them in every pass.
        teacher: The unpruned model, for recipes that learn from it.
        drop: The blocks that were removed from it, for recipes that train around the cut.
        packed: Whether windows hold several short rows, which attention does not cross, or one each, padded.
        template: ``alpaca``, ``chat`` (the tokenizer's own) or ``auto``; the recipe's if None.

    Raises:
        InputError: Bad data, recipe or settings; a checkpoint of another run or a corrupted one; a loss that
            is not finite.
    """
    began = time.perf_counter()
    chosen = get_recipe(recipe)
    wanted = chosen.settings if settings is None else settings
    vocabulary = model.get_input_embeddings().num_embeddings
    form: dict[str, Any] = {"tokenizer": tokenizer, "length": chosen.length, "vocabulary": vocabulary}
    form |= {"supervise": chosen.supervise, "template": template or chosen.template, "packed": packed}
    examples = as_examples(tokens, **form)
    held_out = None if validation is None else as_examples(validation, **form, name="validation data")
    if held_out is None and wanted.select == "best":
        raise InputError("select=best: needs validation data: pass validation, or select='last'")
    resolved = wanted.resolved(len(examples))
    if any(e is not None and e.documents is not None for e in (examples, held_out)):
        reason = isolates(model)
        if reason is not None:
            raise InputError(f"{reason}: pass packed=False (--padded)")
    if chosen.teacher and teacher is None:
        raise InputError(f"recipe {chosen.name}: learns from the unpruned model: name it by --teacher")
    start = provenance()
    depth = 0 if cache is None else cache.wanted(model, chosen, resolved, examples)
    stored = None if cache is None else cache.described(model, examples, depth)

    checkpointing = resolved.gradient_checkpointing
    prepared = prepare(model, chosen, seed=resolved.seed, drop=drop, gradient_checkpointing=checkpointing)
    device = _device(prepared)
    measured = reset_peak(device)
    identity = {
        "recipe": chosen.described(),
        # how often a run is stored does not change what it computes
        "settings": {k: v for k, v in asdict(resolved).items() if k != "checkpoint_every"},
        "model": {"sha256": model_fingerprint(model)},
        "data": {
            "train": examples.fingerprint(),
            "validation": None if held_out is None else held_out.fingerprint(),
        },
        "numerics": {"torch": torch.__version__, "device": device.type},
    }
    if stored is not None:
        identity["numerics"]["cache"] = stored["dtype"]
    if chosen.teacher and teacher is not None:
        identity["teacher"] = {"sha256": model_fingerprint(teacher), "drop": list(drop or ())}
    checkpoints = None if directory is None else Checkpoints(directory, identity)
    master = Teacher(teacher, drop or ()) if chosen.teacher and teacher is not None else None
    passes = _passes(prepared, resolved, model, examples, held_out, cache, depth, master)
    told: dict[str, Any] = {"validation": held_out, "checkpoints": checkpoints, "on_row": on_row}
    outcome = fit(prepared, examples, resolved, **told, stepper=passes)

    history = pd.DataFrame(outcome.progress.history, columns=COLUMNS)
    manifest = {
        **start,
        **identity,
        "source": chosen.source,
        "learning_rate": resolved.learning_rate,
        **_counts(prepared, outcome),
        "peak_memory_bytes": peak_bytes(device),
        "peak_memory_of": "this run" if measured else "the process",
        "portion": passes.portion,
        "processes": passes.workers.count,
        "cache": stored,
        "wall_seconds": time.perf_counter() - began,
        **_losses(outcome, history),
        "dtype": str(next(iter(prepared.parameters.values())).dtype).removeprefix("torch."),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "head_untied": prepared.head_untied,
        "notes": prepared.notes,
    }
    return HealResult(finish(prepared), history, outcome.tensors, manifest, prepared.adapter_config)


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


def heal_model(
    model: PreTrainedModel,
    tokens_or_rows: Rows,
    recipe: str | Recipe = "partial-3",
    *,
    tokenizer: Any = None,
    validation: Rows | None = None,
    out: str | os.PathLike[str] | None = None,
    adapter: bool = False,
    cache: Cache | None = None,
    teacher: PreTrainedModel | None = None,
    drop: Sequence[int] | None = None,
    packed: bool = True,
    template: str | None = None,
    **overrides: Any,
) -> HealResult:
    """Heal a copy of a pruned model with a recipe's settings, and store it where a folder is named.

    Args:
        model: A causal language model of transformers; left as it is.
        tokens_or_rows: Token ids ``[n, T]``, or dictionaries with ``text`` or Alpaca's columns.
        recipe: ``head``, ``partial-k``, ``lora`` or a preset; see :func:`preln.heal.recipe_names`.
        tokenizer: Needed for rows of text; saved with the model under ``out``.
        validation: Held-out data whose loss is measured. Without them a preset that keeps the best weights
            keeps the last.
        out: Folder for the healed checkpoint. While the run lasts its checkpoints are in ``<out>.resume``
            beside it; the same call continues a run that was stopped.
        adapter: Whether ``out`` holds a PEFT adapter instead of the merged model.
        cache: Where states in front of the blocks that train are kept; with ``out``, beside it by default.
        teacher: The unpruned model, for recipes that learn from it.
        drop: The blocks that were removed from it.
        packed: Whether windows hold several short rows; see :func:`train`.
        template: Of instruction rows.
        **overrides: Fields of :class:`TrainingSettings` that replace the recipe's: ``learning_rate``,
            ``steps``, ``batch_size``, ``seed`` and so on. None leaves a field as it is.

    Raises:
        InputError: Bad data, recipe, setting or folder; a loss that is not finite.
    """
    chosen = get_recipe(recipe)
    settings = chosen.settings_for(**overrides)
    if validation is None and overrides.get("select") is None:
        settings = settings.replaced(select="last")
    directory = None
    if out is not None:
        check_target(out, chosen, adapter=adapter)
        directory = Path(f"{os.fspath(out).rstrip('/')}.resume")
        cache = cache or Cache(directory / "prefix")
    result = train(
        model,
        tokens_or_rows,
        validation=validation,
        recipe=chosen,
        settings=settings,
        directory=directory,
        tokenizer=tokenizer,
        cache=cache,
        teacher=teacher,
        drop=drop,
        packed=packed,
        template=template,
    )
    if out is not None and directory is not None and Workers(_plain_device(result.model)).main:
        save_healed(result, tokenizer, out, adapter=adapter)
        shutil.rmtree(directory, ignore_errors=True)
    return result


def heal(
    model: PreTrainedModel, tokens_or_rows: Rows, recipe: str | Recipe = "partial-3", **options: Any
) -> PreTrainedModel:
    """The healed model of :func:`heal_model`, which lists the options; ``model`` itself is left as it is.

    Raises:
        InputError: Bad data, recipe, setting or folder; a loss that is not finite.
    """
    return heal_model(model, tokens_or_rows, recipe, **options).model


def _passes(
    prepared: Prepared,
    settings: TrainingSettings,
    model: PreTrainedModel,
    examples: Examples,
    held_out: Examples | None,
    cache: Cache | None,
    depth: int,
    teacher: Teacher | None,
) -> Stepper:
    """What runs the passes: the whole model, or its end behind stored states."""
    if cache is None or depth == 0:
        return Stepper(prepared, settings, teacher=teacher)
    size = settings.batch_size // settings.gradient_accumulation
    workers = Workers(_device(prepared))

    def stored(rows: Examples, label: str) -> Prefix:
        return workers.after_main(lambda: cache.states(model, rows, depth, batch_size=size, label=label))

    prefix = stored(examples, "train")
    other = None if held_out is None else stored(held_out, "validation")
    return Stepper(prepared, settings, depth=depth, prefix=prefix, held_out=other)


def _counts(prepared: Prepared, outcome: Fit) -> dict[str, Any]:
    """What the run took. ``seconds`` counts the updates alone, not validation and checkpoints."""
    return {
        "trainable_parameters": sum(p.numel() for p in prepared.parameters.values()),
        "total_parameters": sum(p.numel() for p in prepared.model.parameters()),
        "steps": outcome.progress.step,
        "tokens": outcome.progress.tokens,
        "supervised_tokens": outcome.progress.supervised,
        "seconds": outcome.progress.seconds,
    }


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


def _plain_device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def _device(prepared: Prepared) -> torch.device:
    return next(iter(prepared.parameters.values())).device
