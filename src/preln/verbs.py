"""Verbs that take a model: each reads its arguments, calls one room, and tells what came back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from preln import told
from preln.base.errors import InputError
from preln.base.files import staged_directory
from preln.folders import Outcome, makes_folder

DONE, NOT_HELD, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def _tokens(
    arguments: argparse.Namespace,
    tokenizer: Any,
    split: Literal["train", "validation"] = "train",
    count: int | None = None,
) -> Any:
    from preln.data import load_tokens

    return load_tokens(
        arguments.data,
        tokenizer,
        sequences=count or arguments.sequences,
        length=arguments.length,
        seed=arguments.seed,
        split=split,
    )


def _model(arguments: argparse.Namespace) -> Any:
    from preln.models import load_model

    return load_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        attn_implementation=getattr(arguments, "attention", None),
        seed=arguments.seed,
        own_code=arguments.own_code,
    )


def _called(spec: str) -> str:
    """What results call a model: of a local path the last part alone, for the rest says nothing elsewhere."""
    path = Path(spec).expanduser()
    return path.resolve().name if path.exists() else spec


@makes_folder(told.probe_again)
def probe(arguments: argparse.Namespace) -> Outcome:
    """Measure a model."""
    from preln.probe import probe_tables, write_probe

    model, tokenizer = _model(arguments)
    resume = Path(f"{arguments.out}.resume") if arguments.out else None
    result = probe_tables(
        model,
        _tokens(arguments, tokenizer),
        measures=arguments.measures.split(",") if arguments.measures else None,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        jacobian_sequences=arguments.jacobian_sequences,
        resume=resume,
    )
    if arguments.out:
        write_probe(result, arguments.out)
    return told.probe(arguments, result.layers, result.manifest), DONE


@makes_folder(told.score_again)
def score(arguments: argparse.Namespace) -> Outcome:
    """Score every block under some metrics, and measure what following each of them costs."""
    from preln.data import fingerprint
    from preln.prune import compare, score_any, write_scores

    if arguments.damage and arguments.drop:
        raise InputError("--drop, --damage: the sizes of --damage are the numbers to go: leave --drop out")
    model, tokenizer = _model(arguments)
    tokens = _tokens(arguments, tokenizer)
    settings = {"seed": arguments.seed, "protect": arguments.protect}
    extra: dict[str, Any] = {}
    facts: dict[str, Any] = {"name": arguments.model, "source": arguments.data}
    if arguments.damage:
        held_out = _tokens(arguments, tokenizer, "validation", arguments.validation_sequences)
        found = compare(model, tokens, held_out, arguments.metrics, drops=arguments.damage, **settings)
        table, extra = found.scores, {"correlations": found.correlations, "damage": found.damage}
        facts["held_out"] = {"sha256": fingerprint(held_out), "shape": list(held_out.shape)}
    else:
        table = score_any(model, tokens, arguments.metrics, size=arguments.drop, **settings)
    if arguments.out:
        write_scores(table, model, tokens, arguments.out, seed=arguments.seed, extra=extra, **facts)
    return told.score(arguments, table, extra, table.attrs["size"]), DONE


@makes_folder(told.prune_again)
def prune(arguments: argparse.Namespace) -> Outcome:
    """Cut blocks or halves of blocks out of a model, or replace them, and write a checkpoint."""
    from preln.models import licence_of
    from preln.prune import carry_out, write_checkpoint

    if not arguments.out:
        raise InputError("--out is missing: name the folder for the pruned checkpoint")
    model, tokenizer = _model(arguments)
    small, plan = carry_out(
        model,
        lambda: _tokens(arguments, tokenizer),
        name=_called(arguments.model),
        method=arguments.method,
        settings=arguments.set,
        compact=arguments.format == "compact",
        metric=arguments.metric,
        drop=arguments.drop,
        layers=arguments.layers,
        plan=arguments.plan,
        protect=arguments.protect,
        seed=arguments.seed,
    )
    print(plan.describe(), flush=True)
    licence = licence_of(arguments.model)
    write_checkpoint(small, tokenizer, plan, arguments.out, licence=licence)
    return told.prune(arguments, plan), DONE


def _rows(arguments: argparse.Namespace, tokenizer: Any, split: Literal["train", "validation"]) -> Any:
    """Token windows, or rows of text and instructions where they are asked for."""
    from preln.data import load_rows

    count = arguments.validation_sequences if split == "validation" else None
    if arguments.rows is None:
        return _tokens(arguments, tokenizer, split, count)
    return load_rows(arguments.data, split=split, limit=count or arguments.rows, seed=arguments.seed)


@makes_folder(told.heal_again)
def heal(arguments: argparse.Namespace) -> Outcome:
    """Recover a pruned model, or compare ways to."""
    from preln.heal import Cache, heal_model
    from preln.heal.command import dropped_blocks, read_recipes, spread, sweep_verb
    from preln.models import load_model

    if not arguments.out:
        raise InputError("--out is missing: name the folder for the healed checkpoint")
    recipes = read_recipes(arguments.recipe, arguments.set, several=bool(arguments.sweep))
    drop = dropped_blocks(arguments.model, arguments.dropped)
    options, arguments.device = spread(arguments)
    model, tokenizer = _model(arguments)
    options |= {"tokenizer": tokenizer, "packed": not arguments.padded}
    options |= {"template": arguments.template, "drop": drop}
    if arguments.teacher:
        beside = options.get("device", arguments.device)
        options["teacher"] = load_model(arguments.teacher, device=beside, dtype=arguments.dtype)[0]
    budget = None if arguments.cache_budget is None else int(arguments.cache_budget * 2**30)
    resume = f"{arguments.out}.resume"
    options["cache"] = Cache(Path(resume) / "prefix", arguments.cache, arguments.cache_dtype, budget)
    names = ("steps", "batch_size", "learning_rate", "checkpoint_every")
    settings = {name: getattr(arguments, name) for name in names}
    train, held_out = (_rows(arguments, tokenizer, split) for split in ("train", "validation"))
    if arguments.sweep:
        lines = sweep_verb(model, train, held_out, recipes, arguments, options, settings)
        return told.sweep(arguments, lines), DONE
    result = heal_model(
        model,
        train,
        recipe=recipes[0],
        validation=held_out,
        out=arguments.out,
        adapter=arguments.adapter,
        seed=arguments.seed,
        **options,
        **settings,
    )
    return told.heal(arguments, result.manifest), DONE


@makes_folder(told.evaluate_again)
def evaluate(arguments: argparse.Namespace) -> Outcome:
    """Weigh a model: perplexity, tasks, speed, and what it writes."""
    from preln.evaluate import SUITES, read_results, write_results
    from preln.evaluate import evaluate as weigh
    from preln.models import load_model

    tasks = [name for name in (arguments.tasks or "").split(",") if name]
    tasks = tasks or list(SUITES.get(arguments.suite, ()))
    if arguments.new_tokens and not arguments.data:
        raise InputError("--new-tokens continues windows of text: name them with --data")
    against = read_results(arguments.against) if arguments.against else None
    model, tokenizer = _model(arguments)
    reference = None
    if arguments.reference:
        reference = load_model(arguments.reference, device=arguments.device, dtype=arguments.dtype)[0]
    tokens = _tokens(arguments, tokenizer, "validation") if arguments.data else None
    prompts = None
    if arguments.new_tokens and tokens is not None:
        prompts = tokens[:, : max(1, tokens.shape[1] // 2)]
    result = weigh(
        model,
        tokenizer,
        tasks or None,
        tokens=tokens,
        stride=arguments.stride,
        positions=arguments.positions,
        prompts=prompts,
        new_tokens=arguments.new_tokens or 64,
        timed=arguments.timed,
        reference=reference,
        against=against,
        limit=arguments.limit,
        source=arguments.source,
        seed=arguments.seed,
        name=_called(arguments.model),
    )
    if arguments.out:
        with staged_directory(arguments.out, checksums=True) as folder:
            write_results(result, folder)
    return told.evaluate(arguments, result), DONE
