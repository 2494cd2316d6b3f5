"""Lowest and newest versions: a subset of the tests beside each end of the ranges that the project declares.

Run `python benchmarks/versions.py [--sets lowest newest] [--folder DIR] [--json]`. The lowest set pins torch,
transformers, peft and lm-eval to the lower bounds of pyproject.toml, the newest takes the last releases on
the package index. On Linux both bring torch with its CUDA packages, some 7 GB a set. Environments in DIR that
are there already are used as they are; without DIR they are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from installs import pip, python

ROOT = Path(__file__).resolve().parents[1]
SETS = ("lowest", "newest")
WATCHED = ("torch", "transformers", "peft", "lm-eval")
BESIDE = ("pytest", "beartype", "setuptools")
LEFT_OUT = ("ray", "log")  # extras that none of the tests below need
FILES = (
    *("tests/closed_form/test_interface.py", "tests/models/test_load.py", "tests/models/test_surgery.py"),
    *("tests/probe/test_measures.py", "tests/heal/test_loop.py", "tests/heal/test_adapters.py"),
    "tests/evaluate/test_harness.py",
)


@dataclass
class Tried:
    """What came of one set of versions.

    Attributes:
        name: ``lowest`` or ``newest``.
        versions: Of the packages that are watched.
        passed: Tests that passed.
        skipped: Tests that were skipped.
        failed: Names of those that failed, and what did not install.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)


def requirements() -> list[str]:
    """Everything that the tests below need, as the project declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    extras = [
        line for name, lines in groups.items() if name not in (*LEFT_OUT, "all", "dev") for line in lines
    ]
    return [*project["dependencies"], *extras]


def lower_bound(requirement: str) -> str | None:
    """A requirement pinned to its lower bound, for a package that is watched; None for others.

    >>> lower_bound("peft>=0.18"), lower_bound("numpy>=2.0")
    ('peft==0.18.0', None)
    """
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    if found is None or found[1] not in WATCHED:
        return None
    return f"{found[1]}=={found[2]}{'.0' * (2 - found[2].count('.'))}"


def install(environment: Path, name: str) -> None:
    """Make an environment of a set's versions."""
    wanted = requirements()
    if name == "lowest":
        wanted = [lower_bound(requirement) or requirement for requirement in wanted]
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip(environment, "install", "--quiet", "--no-compile", *wanted, *BESIDE)


def try_set(name: str, environment: Path, files: Sequence[str] = FILES) -> Tried:
    """Install a set where it is not there, and run the tests beside it."""
    found = Tried(name)
    try:
        if not environment.is_dir():
            install(environment, name)
        listed = json.loads(pip(environment, "list", "--format", "json"))
    except RuntimeError as error:
        found.failed.append(f"does not install: {error}")
        return found
    versions = {p["name"].lower().replace("_", "-"): p["version"] for p in listed}
    found.versions = {package: versions.get(package, "missing") for package in WATCHED}
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), "CI": "1"}
    command = [str(python(environment)), "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *files]
    answer = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    found.failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", answer.stdout, re.M)
    last = (answer.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", last)}
    found.passed, found.skipped = counts.get("passed", 0), counts.get("skipped", 0)
    if answer.returncode and not found.failed:
        found.failed.append((answer.stderr.strip().splitlines() or [last])[-1])
    return found


def table(rows: Sequence[Tried]) -> str:
    """The sets as a Markdown table."""
    lines = [f"| set | {' | '.join(WATCHED)} | passed | skipped | failed |", "|---" * 8 + "|"]
    for row in rows:
        versions = " | ".join(row.versions.get(package, "–") for package in WATCHED)
        failed = ", ".join(f"`{name}`" for name in row.failed) or "none"
        lines.append(f"| {row.name} | {versions} | {row.passed} | {row.skipped} | {failed} |")
    return "\n".join(lines)


def main() -> int:
    """Install, test, print the table; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--folder", type=Path, help="for the environments, which stay there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [try_set(name, folder / name) for name in arguments.sets]
    print(json.dumps([vars(row) for row in rows]) if arguments.json else table(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
