"""Generating the write-up's numbers, tables and figures, and the command line around it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from preln.base.errors import InputError
from preln.base.files import write_bytes, write_text
from preln.report.findings import SHOWN
from preln.report.paper.check import Index, check_log, check_source, read_index
from preln.report.paper.figures import FIGURES
from preln.report.paper.results import Results, read_results
from preln.report.paper.tables import TABLES
from preln.report.paper.values import theorems, values
from preln.report.style import render
from preln.theory import registry


def generate(
    paper: str | Path, results: str | Path | None = None, published: str | Path | None = None
) -> Path:
    r"""Write `generated/` of a paper: `numbers.tex`, `index.json`, `tables/*.tex`, `figures/*.pdf`.

    The same results give the same bytes. Everything is read and drawn before the first file is written.

    Args:
        paper: The folder of `main.tex`.
        results: The committed results; by default `experiments/results` beside the paper's folder.
        published: The published numbers; by default `experiments/published/reassessing.yaml`.

    Returns:
        The folder `generated`.

    Raises:
        InputError: A results folder is missing or damaged; the line names it.
    """
    folder = Path(paper)
    beside = folder.resolve().parent / "experiments"
    found = read_results(
        results or beside / "results", published or beside / "published" / "reassessing.yaml"
    )
    index = Index(values(found), theorems(found), _statuses(found))
    files: dict[str, bytes] = {
        "numbers.tex": _macros(index).encode(),
        "index.json": (json.dumps(vars(index), indent=1, sort_keys=True) + "\n").encode(),
    }
    files |= {f"tables/{name}.tex": table(found).encode() for name, table in TABLES.items()}
    files |= {f"figures/{name}.pdf": render(draw(found), "pdf") for name, draw in FIGURES.items()}
    older = older_statements(found)
    if older:
        told = f"{len(older)} statements of the stored ledger differ from the code's ({', '.join(older)})"
        print(f"note: {told}: run the study again", file=sys.stderr)
    target = folder / "generated"
    for name, content in files.items():
        write_bytes(target / name, content)
    write_text(target / "README.txt", "Made by `make paper` from experiments/results. Do not edit.\n")
    return target


def older_statements(results: Results) -> list[str]:
    """IDs whose statement in the stored ledger is not, or no longer, one that the code decides."""
    known = registry()
    return [
        str(claim["id"])
        for claim in results.study.claims
        if claim["id"] not in known or known[claim["id"]].statement != claim["statement"]
    ]


def _statuses(results: Results) -> dict[str, str]:
    """The verdict of every hypothesis that the study decided."""
    return {str(v["id"]): SHOWN[v["status"]] for v in results.study.verdicts}


def _macros(index: Index) -> str:
    lines = ["% Made by `make paper` from the committed results. Do not edit."]
    lines += [rf"\setval{{{key}}}{{{value}}}" for key, value in index.values.items()]
    lines += [rf"\sethyp{{{key}}}{{{value}}}" for key, value in sorted(index.hypotheses.items())]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of :mod:`preln.report.paper`."""
    parser = argparse.ArgumentParser(prog="python -m preln.report.paper")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("generate", help="macros, tables and figures from committed results")
    make.add_argument("paper")
    make.add_argument("--results")
    make.add_argument("--published")
    look = verbs.add_parser("check", help="numbers typed by hand, claims that the ledger does not bear")
    look.add_argument("source")
    look.add_argument("--generated")
    read = verbs.add_parser("log", help="undefined references and overfull boxes")
    read.add_argument("log")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "generate":
            print(generate(chosen.paper, chosen.results, chosen.published))
            return 0
        if chosen.verb == "check":
            source = Path(chosen.source)
            index = read_index(chosen.generated or source.parent / "generated")
            problems = check_source(source, index)
        else:
            problems = check_log(chosen.log)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
