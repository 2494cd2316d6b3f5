"""Verbs that take a model: each reads its arguments, calls one room, and prints what came back."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from preln.base.errors import InputError
from preln.base.files import staged_directory
from preln.base.locks import claimed_folder

Outcome = tuple[dict[str, Any], int]
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


def _makes_folder(verb: Callable[[argparse.Namespace], Outcome]) -> Callable[[argparse.Namespace], Outcome]:
    """``verb``, holding the folder that ``--out`` names; before the work it is said if none can be made.

    Of two commands with one ``--out`` at once the second is refused. Of the processes of a launcher, which
    work together, the first holds the folder.

    Raises:
        InputError: Another command is writing there, it is no empty folder, or the disk refuses it.
    """

    @functools.wraps(verb)
    def held(arguments: argparse.Namespace) -> Outcome:
        out = arguments.out
        if not out:
            return verb(arguments)
        _check_free(out)
        if os.environ.get("RANK", "0") != "0":
            return verb(arguments)
        with claimed_folder(out):
            _check_free(out)  # what was there a moment ago may have become whole
            return verb(arguments)

    return held


def _check_free(out: str) -> None:
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder: name another, or remove it")


def _called(spec: str) -> str:
    """What results call a model: of a local path the last part alone, for the rest says nothing elsewhere."""
    path = Path(spec).expanduser()
    return path.resolve().name if path.exists() else spec


@_makes_folder
def probe(arguments: argparse.Namespace) -> Outcome:
    """Measure a model."""
    from preln.probe import answers, describe, probe_tables, write_probe

    model, tokenizer = _model(arguments)
    resume = Path(f"{os.fspath(arguments.out).rstrip('/')}.resume") if arguments.out else None
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
        shutil.rmtree(str(resume), ignore_errors=True)
    print(describe(result.layers, result.manifest["notes"]))
    keys = ("placement", "loss", "dtype", "attn_implementation", "num_blocks")
    said = {"answers": answers(result.layers)} | {key: result.manifest[key] for key in keys}
    return {"out": arguments.out, **said}, DONE


@_makes_folder
def score(arguments: argparse.Namespace) -> Outcome:
    """Score every block under some metrics, and measure what following each of them costs."""
    from preln.data import fingerprint
    from preln.prune import compare, describe_scores, orders, score_any, write_scores

    if arguments.damage and arguments.drop:
        raise InputError("--drop, --damage: the sizes of --damage are the numbers to go: leave --drop out")
    model, tokenizer = _model(arguments)
    tokens = _tokens(arguments, tokenizer)
    told = {"seed": arguments.seed, "protect": arguments.protect}
    said: dict[str, Any] = {"protect": arguments.protect}
    extra: dict[str, Any] = {}
    facts: dict[str, Any] = {"name": arguments.model, "source": arguments.data}
    if arguments.damage:
        held_out = _tokens(arguments, tokenizer, "validation", arguments.validation_sequences)
        found = compare(model, tokens, held_out, arguments.metrics, drops=arguments.damage, **told)
        table, extra = found.scores, {"correlations": found.correlations, "damage": found.damage}
        facts["held_out"] = {"sha256": fingerprint(held_out), "shape": list(held_out.shape)}
        damage = found.damage.astype(object).where(found.damage.notna(), None)
        said |= {"size": max(arguments.damage), "damage": damage.to_dict("records")}
    else:
        table = score_any(model, tokens, arguments.metrics, size=arguments.drop, **told)
        said["size"] = table.attrs["size"]
    if arguments.out:
        write_scores(table, model, tokens, arguments.out, seed=arguments.seed, extra=extra, **facts)
    print(describe_scores(table))
    if extra:
        matrix = extra["correlations"].pivot(index="metric", columns="other", values="spearman")
        print(f"\nrank correlation of the orders of blocks\n{matrix.round(2).to_string()}")
        print(f"\nheld-out loss without the first blocks\n{extra['damage'].round(4).to_string(index=False)}")
    return said | {"out": arguments.out, "order": orders(table)}, DONE


@_makes_folder
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
    halves = {"drop_attention": list(plan.drop_attention), "drop_mlp": list(plan.drop_mlp)}
    said: dict[str, Any] = halves if any(halves.values()) else {}
    if plan.method != "remove":
        said["method"] = plan.method
    return {"out": arguments.out, "drop": list(plan.drop), "keep": list(plan.keep)} | said, DONE


def _rows(arguments: argparse.Namespace, tokenizer: Any, split: Literal["train", "validation"]) -> Any:
    """Token windows, or rows of text and instructions where they are asked for."""
    from preln.data import load_rows

    count = arguments.validation_sequences if split == "validation" else None
    if arguments.rows is None:
        return _tokens(arguments, tokenizer, split, count)
    return load_rows(arguments.data, split=split, limit=count or arguments.rows, seed=arguments.seed)


@_makes_folder
def heal(arguments: argparse.Namespace) -> Outcome:
    """Recover a pruned model, or compare ways to."""
    from preln.heal import Cache, heal_model
    from preln.heal.command import dropped_blocks, read_recipes, spread, sweep_verb
    from preln.models import load_model

    if not arguments.out:
        raise InputError("--out is missing: name the folder for the healed checkpoint")
    recipes = read_recipes(arguments.recipe, arguments.set, several=bool(arguments.sweep))
    drop = dropped_blocks(arguments.model, arguments.dropped)
    told, arguments.device = spread(arguments)
    model, tokenizer = _model(arguments)
    told |= {"tokenizer": tokenizer, "packed": not arguments.padded}
    told |= {"template": arguments.template, "drop": drop}
    if arguments.teacher:
        beside = told.get("device", arguments.device)
        told["teacher"] = load_model(arguments.teacher, device=beside, dtype=arguments.dtype)[0]
    budget = None if arguments.cache_budget is None else int(arguments.cache_budget * 2**30)
    resume = f"{os.fspath(arguments.out).rstrip('/')}.resume"
    told["cache"] = Cache(Path(resume) / "prefix", arguments.cache, arguments.cache_dtype, budget)
    names = ("steps", "batch_size", "learning_rate", "checkpoint_every")
    settings = {name: getattr(arguments, name) for name in names}
    train, held_out = (_rows(arguments, tokenizer, split) for split in ("train", "validation"))
    if arguments.sweep:
        return sweep_verb(model, train, held_out, recipes, arguments, told, settings), DONE
    result = heal_model(
        model,
        train,
        recipe=recipes[0],
        validation=held_out,
        out=arguments.out,
        adapter=arguments.adapter,
        seed=arguments.seed,
        **told,
        **settings,
    )
    keys = ("loss_before", "loss_after", "trainable_parameters", "steps", "tokens", "seconds", "cache")
    summary = {key: result.manifest[key] for key in keys}
    print(f"validation loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f}: {arguments.out}")
    return {"out": arguments.out, **summary}, DONE


@_makes_folder
def evaluate(arguments: argparse.Namespace) -> Outcome:
    """Weigh a model: perplexity, tasks, speed, and what it writes."""
    from preln.evaluate import SUITES, read_results, write_results
    from preln.evaluate import evaluate as weigh
    from preln.evaluate.api import records
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
    shown = {"tasks": result["tasks"], "mean_acc": result["mean_acc"], "perplexity": result.get("perplexity")}
    shown |= {part: result[part] for part in ("strided", "generation") if part in result}
    frames = ("comparison", "positions", "speed", "speedup")
    shown |= {part: records(result[part]) for part in frames if part in result}
    print(json.dumps(shown, indent=2))
    return {"out": arguments.out, **shown}, DONE
