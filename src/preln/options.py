"""The options of every verb. Nothing heavy is imported, so that ``preln --help`` answers at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

_DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
_MODEL = "hub id, checkpoint folder, .gguf file, smollm2-135m, or tiny:llama and its like"
_OWN_CODE = "run the checkpoint's own code for this class, as modeling_own.OwnForCausalLM; it is shown first"
_DATA = "docstrings, a .jsonl[.gz] or .txt[.gz] path, or a hub data set id"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Name what is wrong and where help is, and exit with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}: see {self.prog} --help\n")


def count(text: str) -> int:
    """A whole number from 1 to a billion."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 10**9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at least 1 and at most 1e9")
    return value


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, comma-separated."""
    return [count(part) for part in text.split(",")]


def seed(text: str) -> int:
    """A whole number from 0 to 2^32 - 1, which every generator of random numbers takes."""
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 4294967295")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, up to 1e12."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e12:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no positive number up to 1e12")
    return value


def _with_data(parser: Parser, *, default: str | None = "docstrings", sequences: int = 8) -> None:
    parser.add_argument("--data", metavar="SRC", default=default, help=f"{_DATA} (default: {default})")
    parser.add_argument(
        "--sequences", type=count, default=sequences, help="token windows (default: %(default)s)"
    )
    parser.add_argument("--length", type=count, default=128, help="tokens in a window (default: %(default)s)")


def _add(
    verbs: Any, version: str, name: str, text: str, *, model: bool = True, study: bool = False
) -> Parser:
    parser: Parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--version", action="version", version=f"preln {version}")
    if model:
        parser.add_argument("model", metavar="MODEL", help=_MODEL)
        parser.add_argument("--own-code", metavar="FILE.CLASS", help=_OWN_CODE)
    own = "default: the study's"
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1, auto ({own if study else 'default: cpu'})")
    parser.add_argument("--dtype", choices=_DTYPES, help=own if study else "default: float32")
    parser.add_argument("--seed", type=seed, help=own if study else "default: 0")
    if not study:
        parser.set_defaults(device="cpu", dtype="float32", seed=0)
    parser.add_argument("--out", metavar="DIR", help="folder to write to")
    parser.add_argument("--json", action="store_true", help="end stdout with one line holding a JSON object")
    return parser


def build_parser(version: str) -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="preln",
        description="Proofs about Pre-LN gradient flow, and measurements that put them to the test.",
        epilog="Exit codes: 0 done; 1 something expected does not hold; 2 bad input; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"preln {version}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    verify = _add(verbs, version, "verify", "derive, decide and property-test the theorems", model=False)
    verify.add_argument("ids", metavar="ID", nargs="*", help="claims to decide (default: all)")
    verify.add_argument("--profile", choices=("quick", "full"), default="quick", help="default: %(default)s")
    verify.add_argument(
        "--ledger",
        metavar="PATH.py",
        action="append",
        default=[],
        help="add claims of your own (runs the file)",
    )
    verify.add_argument(
        "--check", action="store_true", help="only check that registry, written proofs and tests agree"
    )

    probe = _add(verbs, version, "probe", "measure gradient flow through a model")
    _with_data(probe)
    probe.add_argument(
        "--measures",
        help="comma-separated names of measures or of groups: stream, updates, gradients, norms, jacobians, "
        "lens, all (default: the first four groups, as far as the model allows)",
    )
    probe.add_argument("--batch-size", type=count, default=4, help="windows in a pass (default: %(default)s)")
    probe.add_argument(
        "--jacobian-sequences",
        type=count,
        default=2,
        help="windows that Jacobian norms are taken on (default: %(default)s)",
    )
    probe.add_argument(
        "--attention", metavar="NAME", help="attention implementation, such as eager (default: the model's)"
    )

    score = _add(verbs, version, "score", "importance of every block under each metric")
    _with_data(score)
    score.add_argument(
        "--metrics",
        default="all",
        help="comma-separated names; all means every criterion that shares its passes, so not the greedy and "
        "iterative ones: sleb, attenuated_contribution, taylor_by_sequence, METRIC@k (k at a time), and over "
        "halves finercut, llm_drop_attention, llm_drop_mlp are asked for by name (default: %(default)s)",
    )
    score.add_argument(
        "--damage",
        type=counts,
        metavar="N[,N…]",
        help="also measure, on held-out text, the loss without the first N blocks of every criterion, and "
        "how far the criteria agree: writes damage.parquet and correlations.parquet",
    )
    score.add_argument(
        "--drop",
        type=count,
        metavar="N",
        help="how many blocks are to go: criteria that choose a set choose it for N (default: a quarter)",
    )
    score.add_argument(
        "--validation-sequences",
        type=count,
        help="held-out windows of --damage (default: as many as --sequences)",
    )
    score.add_argument("--protect", default="none", help="none, uidl, sleb, shortened-plus, finercut")

    prune = _add(
        verbs, version, "prune", "cut out blocks or halves, or replace blocks, and write a checkpoint"
    )
    _with_data(prune)
    prune.add_argument("--metric", help="criterion that chooses the blocks; with --drop")
    prune.add_argument(
        "--drop", type=int, metavar="N", help="how many blocks (or halves, by a metric over halves)"
    )
    prune.add_argument(
        "--layers",
        help="blocks to remove, counted from 0, as 3,4,20-23 (half-open: 20, 21, 22); 5a is the attention "
        "of block 5 alone, 6m the MLP of block 6 alone",
    )
    prune.add_argument(
        "--method",
        metavar="NAME",
        default="remove",
        help="remove, or laco, sliding_merge, mka, grasp, streamline, elder (default: %(default)s)",
    )
    prune.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the method; may be repeated",
    )
    prune.add_argument(
        "--format",
        choices=("plain", "compact"),
        default="plain",
        help="of halves: plain sets them to zero and loads anywhere; compact takes them out and loads with "
        "preln (default: %(default)s)",
    )
    prune.add_argument("--plan", metavar="YAML", help="a plan.yaml written earlier")
    prune.add_argument("--protect", default="none", help="none, uidl, sleb, shortened-plus, finercut")

    heal = _add(verbs, version, "heal", "recover a pruned model")
    _with_data(heal, sequences=256)
    heal.add_argument(
        "--recipe",
        required=True,
        help="head, partial-1, partial-2, partial-3, full, lora, dora, qlora, uidl, distill, seam, "
        "reassess-… and their like; several, comma-separated, with --sweep",
    )
    heal.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="any field of the recipe, its adapter or its settings, such as rank=16; may be repeated",
    )
    heal.add_argument(
        "--rows", type=count, metavar="N", help="train on N rows of text or instructions, packed, not windows"
    )
    heal.add_argument("--padded", action="store_true", help="one row a window, padded, instead of packed")
    heal.add_argument("--template", choices=("auto", "alpaca", "chat"), help="of instruction rows")
    heal.add_argument("--teacher", metavar="MODEL", help="the unpruned model, for distill and seam")
    heal.add_argument(
        "--dropped",
        metavar="LAYERS",
        help="blocks that were removed from it, as 3,4,20-23 (default: those of MODEL's plan.yaml)",
    )
    heal.add_argument(
        "--sweep",
        metavar="NAME=V,V",
        action="append",
        default=[],
        help="heal with each of these values, such as learning_rate=1e-5,1e-4, and write tables; may be "
        "repeated",
    )
    heal.add_argument(
        "--shard",
        choices=("auto", "on", "off"),
        default="auto",
        help="spread the blocks over a launcher's processes (default: %(default)s)",
    )
    heal.add_argument(
        "--log",
        choices=("none", "tensorboard", "trackio"),
        default="none",
        help="write losses and speed to OUT.log (default: %(default)s)",
    )
    heal.add_argument("--seeds", type=count, default=1, help="runs of each in a sweep (default: %(default)s)")
    heal.add_argument(
        "--cache",
        choices=("auto", "on", "off"),
        default="auto",
        help="store what the blocks in front of those that train make of every row (default: %(default)s)",
    )
    heal.add_argument(
        "--cache-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the stored numbers (default: the model's)",
    )
    heal.add_argument(
        "--cache-budget", type=positive, metavar="GIB", help="most disk space for it (default: what is free)"
    )
    heal.add_argument("--steps", type=count, help="optimizer steps (default: the recipe's)")
    heal.add_argument("--batch-size", type=count, help="rows in a step (default: the recipe's)")
    heal.add_argument("--learning-rate", type=positive, help="default: the recipe's")
    heal.add_argument("--checkpoint-every", type=count, help="steps between checkpoints")
    heal.add_argument("--validation-sequences", type=count, default=8, help="default: %(default)s")
    heal.add_argument(
        "--adapter", action="store_true", help="write a PEFT adapter instead of the merged model"
    )

    evaluate = _add(verbs, version, "evaluate", "perplexity, lm-eval tasks, speed, and what it writes")
    _with_data(evaluate, default=None)
    chosen = evaluate.add_mutually_exclusive_group()
    chosen.add_argument("--tasks", help="comma-separated lm-eval tasks, such as piqa,arc_easy")
    chosen.add_argument("--suite", choices=("reassessing", "quick"), help="a fixed list of tasks")
    evaluate.add_argument("--limit", type=count, help="documents a task (default: all)")
    evaluate.add_argument(
        "--source", default="auto", help="where benchmark rows come from (default: %(default)s)"
    )
    evaluate.add_argument(
        "--against", metavar="DIR", help="compare document by document with the results in this folder"
    )
    evaluate.add_argument(
        "--stride", type=count, metavar="N", help="also perplexity in windows N tokens apart"
    )
    evaluate.add_argument("--positions", action="store_true", help="also the loss by position")
    evaluate.add_argument("--timed", action="store_true", help="also seconds and memory, prefill and decode")
    evaluate.add_argument("--reference", metavar="MODEL", help="the unpruned model, for speed and generation")
    evaluate.add_argument(
        "--new-tokens", type=count, metavar="N", help="continue the first half of each window of --data by N"
    )

    run = _add(
        verbs, version, "run", "carry out a study; the same command continues it", model=False, study=True
    )
    run.add_argument("study", metavar="STUDY.yaml")
    run.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local runs one step after another; ray runs steps side by side on a cluster (default: "
        "%(default)s)",
    )
    run.add_argument("--address", help="of a Ray cluster (default: one on this machine for this run)")
    run.add_argument(
        "--retries", type=seed, metavar="N", help="times a step is given to another worker (default: 3)"
    )
    run.add_argument(
        "--cpus", type=positive, metavar="N", help="cores a step takes (default: this process's threads)"
    )
    run.add_argument(
        "--gpus", type=positive, metavar="N", help="GPUs a step takes (default: 1 where the device is one)"
    )
    run.add_argument("--dry-run", action="store_true", help="list the steps and whether they are kept")

    estimate = _add(
        verbs, version, "estimate", "what a study will take, before it runs", model=False, study=True
    )
    estimate.add_argument("study", metavar="STUDY.yaml")
    estimate.add_argument(
        "--hardware",
        metavar="NAME",
        default="here",
        help="here (measured), cpu-2, rtx-4090, a100-40gb, a100-80gb, h100-80gb, h200, 8xh100-80gb "
        "(default: %(default)s)",
    )

    report = _add(verbs, version, "report", "one page, figures and tables from finished runs", model=False)
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders")

    _add(verbs, version, "sources", "list the models and data that can be fetched", model=False)
    return parser
