"""Healing from the outside: train a copy of a pruned model, rebuild it from its trained tensors."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.base.memory import peak_bytes, reset_peak
from preln.base.provenance import provenance
from preln.heal.options.recipes import Recipe, get_recipe
from preln.heal.options.settings import TrainingSettings
from preln.heal.prefix.cache import Cache
from preln.heal.preparing.prepare import finish, prepare
from preln.heal.preparing.sharding import shard as shard_blocks
from preln.heal.preparing.sharding import wants_shards, without_weights
from preln.heal.record import COLUMNS, HealResult, apply_trained, identity_of, outcome_of
from preln.heal.rows.examples import Examples, as_examples
from preln.heal.rows.isolation import isolates
from preln.heal.save import check_target, save_healed
from preln.heal.training.loop import fit
from preln.heal.training.run_log import check_log, run_log
from preln.heal.training.step import make_passes
from preln.heal.training.teacher import Teacher
from preln.heal.training.workers import Workers
from preln.models import model_fingerprint
from preln.models.loss import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Examples | Tensor | Sequence[Mapping[str, Any]]


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
    shard: str = "auto",
    device: str | torch.device | None = None,
    log: str = "none",
    log_folder: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
) -> HealResult:
    """Heal a copy of ``model``; the model itself is left as it is.

    Args:
        model: A causal language model of transformers, as a rule a pruned one.
        tokens: Token ids ``[n, T]``, or rows (see :func:`preln.heal.rows.examples.as_examples`).
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
        shard: With several processes, whether each holds a part of the blocks instead of all: ``on``, ``off``
            or ``auto`` (:func:`preln.heal.preparing.sharding.wants_shards`).
        device: Where the copy trains; where the model is if None. A model on the CPU that is sharded goes to
            a GPU one block at a time.
        log: ``none``, ``tensorboard`` or ``trackio`` (:func:`preln.heal.training.run_log.run_log`).
        log_folder: Where it goes.
        fingerprint: :func:`preln.models.model_fingerprint` of the model, if it is known already.

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
    for each in (examples, held_out):
        check_length(model, 0 if each is None else each.input_ids.shape[1])
    resolved = wanted.resolved(len(examples))
    if any(e is not None and e.documents is not None for e in (examples, held_out)):
        reason = isolates(model)
        if reason is not None:
            raise InputError(f"{reason}: pass packed=False (--padded)")
    if chosen.teacher and teacher is None:
        raise InputError(f"recipe {chosen.name}: learns from the unpruned model: name it by --teacher")
    check_log(log, log_folder)
    home = _home(model)
    where = home if device is None else torch.device(device)
    workers = Workers(where)
    sharded = wants_shards(shard, model, chosen, resolved, workers, where, drop=drop)
    start = provenance()
    # of a model that is elsewhere, one process would run the prefix there: only where that is asked for
    stores = cache is not None and (where.type == home.type or cache.mode == "on")
    depth = cache.wanted(model, chosen, resolved, examples) if cache is not None and stores else 0
    stored = None if cache is None else cache.described(model, examples, depth)

    options = {"gradient_checkpointing": resolved.gradient_checkpointing, "borrowed": sharded}
    prepared = prepare(model, chosen, seed=resolved.seed, drop=drop, **options)
    if sharded:
        if any(e is not None and e.documents is not None for e in (examples, held_out)):
            isolates(prepared.plain)  # tried out while the model is whole
        shard_blocks(prepared, workers, where)
    elif where != home:
        prepared.model.to(where)
    measured = reset_peak(where)
    fingerprint = fingerprint or model_fingerprint(model)
    identity = identity_of(
        chosen,
        resolved,
        examples,
        held_out,
        device=where,
        cache=stored,
        teacher=teacher,
        drop=drop,
        fingerprint=fingerprint,
    )
    checkpoints = None if directory is None else Checkpoints(directory, identity)
    master = Teacher(teacher, drop or ()) if chosen.teacher and teacher is not None else None
    rows = (examples, held_out)
    passes = make_passes(
        prepared, resolved, model, rows, cache, depth, teacher=master, fingerprint=fingerprint
    )
    with run_log(log, log_folder, name=chosen.name, main=workers.main, on_row=on_row) as write:
        told: dict[str, Any] = {"validation": held_out, "checkpoints": checkpoints, "on_row": write}
        outcome = fit(prepared, examples, resolved, **told, stepper=passes)

    history = pd.DataFrame(outcome.progress.history, columns=COLUMNS)
    manifest = {
        **start,
        **identity,
        "source": chosen.source,
        "learning_rate": resolved.learning_rate,
        **outcome_of(prepared, outcome, passes, history),
        "peak_memory_bytes": peak_bytes(where),
        "peak_memory_of": "this run" if measured else "the process",
        "cache": stored,
        "wall_seconds": time.perf_counter() - began,
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
    }
    if not sharded:
        healed = finish(prepared)
    elif workers.main:
        healed = apply_trained(model, chosen, outcome.tensors, drop=drop)
    else:
        healed = without_weights(model)
    return HealResult(healed, history, outcome.tensors, manifest, prepared.adapter_config)


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
    shard: str = "auto",
    device: str | torch.device | None = None,
    log: str = "none",
    log_folder: str | os.PathLike[str] | None = None,
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
        shard: Whether several processes share the blocks; see :func:`train`.
        device: Where the copy trains.
        log: ``none``, ``tensorboard`` or ``trackio``.
        log_folder: Where the log goes; ``<out>.log`` by default.
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
        directory = Path(f"{Path(out)}.resume")
        cache = cache or Cache(directory / "prefix")
        log_folder = log_folder or f"{Path(out)}.log"
    told: dict[str, Any] = {"tokenizer": tokenizer, "packed": packed, "template": template}
    told |= {"cache": cache, "teacher": teacher, "drop": drop}
    told |= {"shard": shard, "device": device, "log": log, "log_folder": log_folder}
    result = train(
        model,
        tokens_or_rows,
        validation=validation,
        recipe=chosen,
        settings=settings,
        directory=directory,
        **told,
    )
    where = _home(model) if device is None else torch.device(device)
    if out is not None and directory is not None and Workers(where).main:
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


def _home(model: PreTrainedModel) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device
