"""The command line: verbs only. Every verb reads its arguments, calls one room, and prints what came back."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from preln import __version__
from preln.base.errors import InputError

DONE, NOT_HELD, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
Outcome = tuple[dict[str, Any], int]


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
    )


def _free(out: str | None) -> str | None:
    """``out`` if a new folder can be made there: said before the work, not after it."""
    path = Path(out) if out else None
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder: name another, or remove it")
    return out


def verify(arguments: argparse.Namespace) -> Outcome:
    """Decide the theorems, and say which claims fail to be what they are listed as."""
    from preln.testing.verify import verify as decide

    if arguments.check:
        return _gate(arguments)
    ledger = decide(arguments.ids or None, profile=arguments.profile, ledgers=arguments.ledger)
    if arguments.out:
        ledger.write(Path(arguments.out) / "ledger.json")
    print(ledger.table())
    print(f"\n{ledger.family_table()}")
    statuses = {name: entry.status for name, entry in ledger.claims.items()}
    result = {"claims": statuses, "families": ledger.families(), "survivors": ledger.survivors()}
    return result | {"ok": ledger.ok, "out": arguments.out}, DONE if ledger.ok else NOT_HELD


def _gate(arguments: argparse.Namespace) -> Outcome:
    """Check that registry, written proofs and tests agree, and that every claim is decided."""
    from preln.testing.gate import checkout, problems
    from preln.theory import decide

    if arguments.ids or arguments.ledger or arguments.out:
        raise InputError("--check: it looks at the whole built-in ledger: leave out IDs, --ledger and --out")
    root = checkout()
    found = problems(decide(), root)
    for line in found:
        print(line)
    print(
        f"{len(found)} problems"
        if found
        else "registry, written proofs and tests agree; every claim is decided"
    )
    return {"problems": found, "ok": not found}, NOT_HELD if found else DONE


def probe(arguments: argparse.Namespace) -> Outcome:
    """Measure a model."""
    from preln.probe import answers, describe, probe_tables, write_probe

    _free(arguments.out)
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


def score(arguments: argparse.Namespace) -> Outcome:
    """Score every block under some metrics."""
    from preln.prune import score as score_blocks
    from preln.prune import write_scores

    _free(arguments.out)
    model, tokenizer = _model(arguments)
    tokens = _tokens(arguments, tokenizer)
    table = score_blocks(
        model,
        tokens,
        arguments.metrics,
        seed=arguments.seed,
        size=arguments.drop,
        protect=arguments.protect,
    )
    if arguments.out:
        write_scores(table, model, tokens, arguments.out, seed=arguments.seed)
    ranks = table.pivot(index="layer", columns="metric", values="rank")
    print("rank of each block (0 is removed first), blocks counted from 0\n" + ranks.to_string())
    order = {str(m): g.sort_values("rank")["layer"].tolist() for m, g in table.groupby("metric", sort=False)}
    said: dict[str, Any] = {name: table.attrs[name] for name in ("size", "protect")}
    return said | {"out": arguments.out, "order": order}, DONE


def prune(arguments: argparse.Namespace) -> Outcome:
    """Cut blocks or halves of blocks out of a model, or replace them, and write a checkpoint."""
    from preln.models import licence_of
    from preln.prune import carry_out, write_checkpoint

    if not arguments.out:
        raise InputError("--out is missing: name the folder for the pruned checkpoint")
    _free(arguments.out)
    model, tokenizer = _model(arguments)
    small, plan = carry_out(
        model,
        lambda: _tokens(arguments, tokenizer),
        name=arguments.model,
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


def heal(arguments: argparse.Namespace) -> Outcome:
    """Recover a pruned model."""
    from preln.heal import heal_model

    if not arguments.out:
        raise InputError("--out is missing: name the folder for the healed checkpoint")
    _free(arguments.out)
    model, tokenizer = _model(arguments)
    result = heal_model(
        model,
        _tokens(arguments, tokenizer),
        recipe=arguments.recipe,
        validation=_tokens(arguments, tokenizer, "validation", arguments.validation_sequences),
        tokenizer=tokenizer,
        out=arguments.out,
        adapter=arguments.adapter,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        checkpoint_every=arguments.checkpoint_every,
        seed=arguments.seed,
    )
    keys = ("loss_before", "loss_after", "trainable_parameters", "steps", "tokens", "seconds")
    summary = {key: result.manifest[key] for key in keys}
    print(f"validation loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f}: {arguments.out}")
    return {"out": arguments.out, **summary}, DONE


def evaluate(arguments: argparse.Namespace) -> Outcome:
    """Weigh a model: perplexity and tasks."""
    from preln.evaluate import evaluate as weigh
    from preln.evaluate import write_results

    _free(arguments.out)
    tasks = [name for name in (arguments.tasks or "").split(",") if name]
    model, tokenizer = _model(arguments)
    tokens = _tokens(arguments, tokenizer, "validation") if arguments.data else None
    result = weigh(
        model,
        tokenizer,
        tasks or None,
        tokens=tokens,
        limit=arguments.limit,
        source=arguments.source,
        seed=arguments.seed,
        name=arguments.model,
    )
    if arguments.out:
        write_results(result, arguments.out)
    shown = {"tasks": result["tasks"], "mean_acc": result["mean_acc"], "perplexity": result.get("perplexity")}
    print(json.dumps(shown, indent=2))
    return {"out": arguments.out, **shown}, DONE


def run(arguments: argparse.Namespace) -> Outcome:
    """Carry out a study."""
    from preln.experiment import default_out, read_study, run_study

    overrides = {k: getattr(arguments, k) for k in ("device", "dtype", "seed") if k in arguments.given}
    study = read_study(arguments.study).model_copy(update=overrides)
    summary = run_study(study, arguments.out or default_out(arguments.study))
    for name, status in summary["verdicts"].items():
        print(f"{name}: {status}")
    for name in summary["failed_claims"]:
        print(f"{name}: a piece of evidence failed, see verify/ledger.json", file=sys.stderr)
    print(summary["run"])
    return summary, NOT_HELD if summary["failed_claims"] else DONE


def report(arguments: argparse.Namespace) -> Outcome:
    """Make the page, the figures and the tables of finished runs."""
    from preln.report import build_report

    runs = [Path(name) for name in arguments.runs]
    index = build_report(runs, Path(arguments.out or runs[0] / "report"))
    print(index)
    return {"index": str(index)}, DONE


def sources(_arguments: argparse.Namespace) -> Outcome:
    """List the models and data that can be fetched, and from where."""
    from preln.data import list_sources
    from preln.models import list_models

    found = {"models": list_models(), "data": list_sources()}
    for kind, entries in found.items():
        print(f"{kind}:")
        for entry in entries:
            print(f"  {entry['name']}: {entry['from']} (needs {entry['needs']})")
    return found, DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 does not hold, 2 bad input, 130 interrupted)."""
    from preln.options import build_parser

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # the libraries' own bars, which do not look
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    verbs: dict[str, Callable[[argparse.Namespace], Outcome]] = {
        f.__name__: f for f in (verify, probe, score, prune, heal, evaluate, run, report, sources)
    }
    arguments = build_parser(__version__).parse_args(argv)
    arguments.given = {word.split("=")[0].lstrip("-") for word in (argv or sys.argv[1:])}
    try:
        summary, code = verbs[arguments.verb](arguments)
        if arguments.json:
            print(json.dumps(summary, allow_nan=False, default=str))
        sys.stdout.flush()
    except InputError as error:
        print(f"preln: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("preln: interrupted: finished work is kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return code


if __name__ == "__main__":
    sys.exit(main())
