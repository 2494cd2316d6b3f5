"""The command line: verbs only. Every verb reads its arguments, calls one room, and prints what came back."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from preln import __version__
from preln.base.errors import InputError
from preln.base.faults import environment_line, is_out_of_memory, memory_line
from preln.base.files import write_json
from preln.base.interrupts import hushed, left, taken
from preln.base.locks import claimed_folder
from preln.base.progress import end_bars
from preln.base.staging import abandon, is_whole
from preln.verbs import BAD_INPUT, DONE, INTERRUPTED, NOT_HELD, Outcome, evaluate, heal, probe, prune, score

# what makes a verb need less memory
_SMALLER = {
    "probe": "lower --batch-size or --length, or use a narrower --dtype",
    "score": "lower --sequences or --length, or use a narrower --dtype",
    "prune": "lower --sequences or --length, or use a narrower --dtype",
    "heal": "lower --batch-size or --length, or use a narrower --dtype",
    "evaluate": "lower --sequences or --length, or use a narrower --dtype",
    "run": "use a smaller model or a narrower dtype in the study",
}


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


def _overrides(arguments: argparse.Namespace) -> dict[str, object]:
    """What the command line says in place of the study."""
    told = {name: getattr(arguments, name) for name in ("device", "dtype", "seed")}
    return {name: value for name, value in told.items() if value is not None}


def run(arguments: argparse.Namespace) -> Outcome:
    """Carry out a study. Of two runs into one folder at once the second is refused."""
    from preln.experiment import Engine, default_out, dry_run, read_study, run_study

    study = read_study(arguments.study).model_copy(update=_overrides(arguments))
    out = arguments.out or default_out(arguments.study)
    told = {name: getattr(arguments, name) for name in ("address", "retries", "cpus", "gpus")}
    engine = Engine(arguments.engine, **told)
    if arguments.dry_run:
        steps = dry_run(study, out, engine)
        for step in steps:
            print(f"{step['id']}: {step['state']}")
        return {"run": str(out), "steps": steps}, DONE
    summary = run_study(study, out, engine)
    for name, status in summary["verdicts"].items():
        print(f"{name}: {status}")
    for name in summary["failed_claims"]:
        print(f"{name}: a piece of evidence failed, see verify/ledger.json", file=sys.stderr)
    print(summary["run"])
    return summary, NOT_HELD if summary["failed_claims"] else DONE


def estimate(arguments: argparse.Namespace) -> Outcome:
    """Say what a study will take on a machine, without loading weights."""
    from preln.experiment import read_study
    from preln.experiment.estimate.estimate import estimate as size_up
    from preln.experiment.estimate.estimate import table

    study = read_study(arguments.study).model_copy(update=_overrides(arguments))
    found = size_up(study, arguments.hardware)
    if arguments.out:
        write_json(Path(arguments.out) / "estimate.json", found)
    print(table(found))
    return found, DONE


def report(arguments: argparse.Namespace) -> Outcome:
    """Make the page, the figures and the tables of finished runs.

    Of two reports into one folder at once the second is refused.
    """
    from preln.report import build_report

    runs = [Path(name) for name in arguments.runs]
    out = Path(arguments.out or runs[0] / "report")
    with claimed_folder(out):
        index = build_report(runs, out)
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
    """Run one verb; returns the exit code (0 done, 1 does not hold, 2 bad input, 130 interrupted).

    What the machine refuses (a full or read-only disk, memory) ends like bad input, with 2 and one line; what
    was finished before is kept. Ctrl-C ends with 130, and a second one at once.
    """
    pressed, arguments = list[bool](), argparse.Namespace(verb="preln", out=None)
    try:
        if argv is None:  # within another program, it decides
            taken(INTERRUPTED, pressed)
        code = _told(arguments, argv, pressed)
        if argv is None:
            left(code)
        return code
    except KeyboardInterrupt:
        pressed.append(True)
    if argv is None:
        hushed()  # the line below is the only one
        abandon()  # what the interrupt kept from being removed
        end_bars()
    kept = "finished work is kept, the same command continues"
    if arguments.out and is_whole(arguments.out):
        kept = f"its work was done, {arguments.out} is whole"
    print(f"preln: interrupted: {kept}", file=sys.stderr)
    if argv is None:
        left(INTERRUPTED)
    return INTERRUPTED


def _told(arguments: argparse.Namespace, argv: Sequence[str] | None, pressed: list[bool]) -> int:
    """Carry the words out; what a user can mend is told in one line; the exit code."""
    try:
        return _carried_out(arguments, argv)
    except BrokenPipeError:
        _drop_output()
        return DONE
    except Exception as error:
        if pressed:  # whatever a library made of the interrupt
            raise KeyboardInterrupt from error
        line = _refusal(error, arguments.verb)
        if line is None:
            raise
        _drop_output()
        if argv is None:
            end_bars()
        print(f"preln: {' '.join(line.split())}", file=sys.stderr)
        return BAD_INPUT


def _carried_out(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Read the words into ``arguments``, carry the verb out, and print its summary; the exit code."""
    from preln.options import build_parser

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # the libraries' own bars, which do not look
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    verbs: dict[str, Callable[[argparse.Namespace], Outcome]] = {
        f.__name__: f for f in (verify, probe, score, prune, heal, evaluate, run, estimate, report, sources)
    }
    build_parser(__version__).parse_args(argv, arguments)
    _check_words(arguments)
    summary, code = verbs[arguments.verb](arguments)
    if arguments.json:
        print(json.dumps(summary, allow_nan=False, default=str))
    sys.stdout.flush()
    return code


def _check_words(arguments: argparse.Namespace) -> None:
    """Refuse what could not be written down in a result.

    Raises:
        InputError: A word that is not UTF-8.
    """
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"{name} {text!a}: is not UTF-8: give another name") from error


def _refusal(error: Exception, verb: str) -> str | None:
    """The line for what a user can mend; None for an error of this program."""
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        return memory_line(error, verb, _SMALLER.get(verb, "give the machine more memory"))
    return environment_line(error, "standard output") if isinstance(error, OSError) else None


def _drop_output() -> None:
    """Send what cannot be printed nowhere: Python would try once more as it ends, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # it is closed, or no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
