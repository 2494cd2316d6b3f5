"""Fill docs/reliability.md: every figure on it comes from a stored result, or is said to be missing.

Run `python benchmarks/reliability.py` to fill the page from `benchmarks/results/*.json`, and with
`--run NAME …` (kills, kills-smollm2, determinism, load, installs, versions, verify, or all) to measure those
first, which takes from a minute (verify) to an hour and more (kills-smollm2).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import determinism
import installs
import load
import versions

from preln.base.errors import InputError
from preln.base.files import read_json, write_json, write_text
from preln.base.provenance import provenance
from preln.report.markdown import cell, fill

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ROOT / "tests"
COMMANDS = {
    "kills": ("benchmarks/kills.py", "--kills", "60"),
    "kills-smollm2": ("benchmarks/kills.py", "--kills", "10", "--model", "smollm2-135m"),
    "determinism": ("benchmarks/determinism.py",),
    "load": ("benchmarks/load.py",),
    "installs": ("benchmarks/installs.py",),
    "versions": ("benchmarks/versions.py",),
    "verify": ("-m", "preln.cli", "verify", "--profile", "quick"),
}
STUDY_AGAIN = "python benchmarks/study_again.py STUDY RUN --out FOLDER"
SHOWN = ("torch", "transformers", "numpy")  # whose versions stand under a table


def measure(name: str) -> Path:
    """Run a benchmark and store what it printed, with where it came from.

    Raises:
        InputError: It did not end with a line of JSON.
    """
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = provenance(command=" ".join(("python", *COMMANDS[name])))
    command = [sys.executable, *COMMANDS[name], "--json"]
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        result = json.loads(answer.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise InputError(f"{name}: printed no result (exit {answer.returncode}): see above") from error
    found |= {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "exit": answer.returncode,
        "result": result,
    }
    return write_json(RESULTS / f"{name}.json", found)


def stored(name: str) -> dict[str, Any] | None:
    """A stored result, None where there is none yet."""
    path = RESULTS / f"{name}.json"
    return read_json(path) if path.is_file() else None


def part(name: str, show: Callable[[dict[str, Any]], str], how: str = "") -> str:
    """A result as Markdown with its origin, or what to type to get one."""
    found = stored(name)
    if found is None:
        return f"Not measured yet: run `{how or f'python benchmarks/reliability.py --run {name}'}`."
    packages = ", ".join(f"{p} {found['packages'][p]}" for p in SHOWN if p in found["packages"])
    commit = (found["git"]["commit"] or "no commit")[:10]
    state = " with uncommitted changes" if found["git"]["dirty"] else ""
    origin = f"{found['start'][:10]}, commit {commit}{state}, {packages}, {found['platform']['machine']}"
    return f"{show(found)}\n\n`{found['command']}`: {origin}."


def kills(found: dict[str, Any]) -> str:
    """Commands that were killed."""
    lines = [
        "| command | kills | with work to go on from | seconds undisturbed | files that differ | failures |",
        "|---|---|---|---|---|---|",
    ]
    rows = found["result"]
    for row in rows:
        lost = "; ".join(map(cell, row["failures"])) or "none"
        differ = ", ".join(f"`{cell(name)}`" for name in row["differences"]) or "none"
        numbers = f"{row['kills']} | {row['kept']} | {row['seconds']:.1f}"
        lines.append(f"| `{row['verb']}` | {numbers} | {differ} | {lost} |")
    total = sum(row["kills"] for row in rows)
    wrong = sum(bool(row["differences"] or row["failures"]) for row in rows)
    lines += ["", f"{total} kills in all; {wrong} of {len(rows)} commands ended otherwise than undisturbed."]
    return "\n".join(lines)


def study(found: dict[str, Any]) -> str:
    """A study that was disturbed."""
    told = found["result"]
    workers = [one["worker"] for one in told["killed"] if "worker" in one]
    who = f"The worker at `{cell(workers[0])}` was killed" if workers else f"{len(told['killed'])} kills"
    when = ", ".join(str(one["finished"]) for one in told["killed"])
    differ = ", ".join(f"`{cell(name)}`" for name in told["differences"]) or "none"
    return (
        f"`{cell(told['study'])}`: {who}, with {when} of {told['steps']} steps finished. "
        f"Of {told['files']} files these differ from the undisturbed run's: {differ}."
    )


def equal(found: dict[str, Any]) -> str:
    """How far numbers move, and a study that was run twice."""
    rows, twice = found["result"]["moved"], found["result"]["twice"]
    differ = ", ".join(f"`{cell(name)}`" for name in twice["differences"]) or "none"
    return (
        f"{determinism.table([determinism.Moved(**row) for row in rows])}\n\n"
        f"A small study and its report, twice: of {twice['files']} files these differ: {differ}."
    )


def verify(found: dict[str, Any]) -> str:
    """The self-test's time and outcome."""
    claims = found["result"]["claims"]
    proved = sum(status == "proved" for status in claims.values())
    outcome = "all as listed" if found["result"]["ok"] else "**not all as listed**"
    return (
        f"{len(claims)} claims ({proved} proved) in {found['cpu_seconds']:.0f} s of processor time, "
        f"{found['seconds']:.0f} s on the clock: {outcome}."
    )


def fuzz() -> str:
    """How many fuzzed inputs each profile tries, counted from the tests themselves."""
    text = (TESTS / "conftest.py").read_text(encoding="utf-8")
    examples = {n: int(k) for n, k in re.findall(r'register_profile\(\s*"(\w+)", max_examples=(\d+)', text)}
    properties = {
        path.name: names
        for path in sorted((TESTS / "reliability").glob("*.py"))
        if (names := _properties(path))
    }
    count = sum(map(len, properties.values()))
    lines = ["| file | properties | cases in CI | cases in the nightly profile |", "|---|---|---|---|"]
    for name, names in properties.items():
        cases = f"{len(names) * examples['ci']:,} | {len(names) * examples['nightly']:,}"
        lines.append(f"| `tests/reliability/{name}` | {len(names)} | {cases} |")
    lines.append(f"| in all | {count} | {count * examples['ci']:,} | {count * examples['nightly']:,} |")
    return "\n".join(lines)


def _properties(path: Path) -> list[str]:
    """Names of the tests of a file that draw their input."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "given" for d in node.decorator_list)
    ]


def parts() -> dict[str, str]:
    """What goes between the page's markers."""
    return {
        "kills": part("kills", kills),
        "kills-smollm2": part("kills-smollm2", kills),
        "study-killed": part("study-killed", study, f"{STUDY_AGAIN} --kills 10 --store"),
        "study-ray": part("study-ray", study, f"{STUDY_AGAIN} --ray --store"),
        "determinism": part("determinism", equal),
        "load": part("load", lambda found: load.table([load.Load(**row) for row in found["result"]])),
        "installs": part(
            "installs", lambda found: installs.table([installs.Installed(**row) for row in found["result"]])
        ),
        "versions": part(
            "versions", lambda found: versions.table([versions.Tried(**row) for row in found["result"]])
        ),
        "verify": part("verify", verify),
        "fuzz": fuzz(),
    }


def main() -> int:
    """Measure what is asked for, fill the page, say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", nargs="+", default=[], choices=("all", *COMMANDS))
    arguments = parser.parse_args()
    try:
        for name in COMMANDS if "all" in arguments.run else arguments.run:
            print(measure(name), flush=True)
        write_text(PAGE, fill(PAGE, parts()))
    except InputError as error:
        sys.exit(f"reliability: {error}")
    for name in COMMANDS:
        if stored(name) is None:
            print(f"missing: {name}: run `python benchmarks/reliability.py --run {name}`", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
