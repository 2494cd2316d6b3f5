"""Clean installs: every extra alone in an environment of its own; its commands work, the others name theirs.

Run `python benchmarks/installs.py [--extras heal eval] [--torch 2.13.0] [--folder DIR] [--json]`. A wheel is
built from the checkout and installed with pip into fresh environments: without extras, then with one extra
each, which begin as hard-linked copies of the first. torch is installed first and pinned, since a plain newer
one brings gigabytes of CUDA packages; all else is what the package index offers. Without DIR the environments
are removed in the end; about 2 GB are written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

import yaml
from kills import SIZE, study

ROOT = Path(__file__).resolve().parents[1]
NONE = "none"  # stands for the environment without extras
GATHERED = ("all", "dev")  # extras made of the others
UNWANTED = "torchvision"  # its wheel breaks `import transformers` beside another build of torch
TEXT = ("--data", "docstrings", "--sequences", "4", "--length", "32")
HEAL = ("heal", "tiny:llama", *TEXT, "--steps", "2", "--batch-size", "2", "--validation-sequences", "2")


@dataclass(frozen=True)
class Case:
    """A command and the extra that it needs.

    Attributes:
        name: What the table calls it.
        extra: Empty where it needs none.
        words: The arguments behind ``preln``; ``{out}``, ``{run}`` and ``{study}`` are replaced.
    """

    name: str
    extra: str
    words: tuple[str, ...]


CASES = (
    Case("sources", "", ("sources",)),
    Case("probe", "", ("probe", "tiny:llama", *SIZE, "--out", "{out}")),
    Case("score", "", ("score", "tiny:llama", *SIZE, "--out", "{out}")),
    Case("prune", "", ("prune", "tiny:llama", "--layers", "1", "--out", "{out}")),
    Case("heal partial-1", "", (*HEAL, "--recipe", "partial-1", "--out", "{out}")),
    Case("evaluate", "", ("evaluate", "tiny:llama", *SIZE, "--out", "{out}")),
    Case("run", "", ("run", "{study}", "--out", "{run}")),
    Case("estimate", "", ("estimate", "{study}", "--hardware", "cpu-2")),
    Case("verify", "theory", ("verify", "RMS-NORM", "RMS-GAIN", "HEAL-PARAMS")),
    Case("heal lora", "heal", (*HEAL, "--recipe", "lora", "--out", "{out}")),
    Case("heal qlora", "heal", (*HEAL, "--recipe", "qlora", "--out", "{out}")),
    Case("evaluate --tasks", "eval", ("evaluate", "tiny:llama", "--tasks", "piqa", "--limit", "2")),
    Case("report", "report", ("report", "{run}", "--out", "{out}")),
    Case("heal --log", "log", (*HEAL, "--recipe", "head", "--log", "tensorboard", "--out", "{out}")),
    Case("run --engine ray", "ray", ("run", "{study}", "--engine", "ray", "--cpus", "1", "--out", "{out}")),
)


@dataclass
class Installed:
    """What came of one environment.

    Attributes:
        extra: Its extra, empty for none.
        packages: How many packages are installed.
        versions: Of those whose versions matter.
        works: Commands that did what they are for, of other extras too where a package came along.
        refused: Commands of other extras that named theirs in one line and exited with 2.
        failures: What went otherwise, one line each.
    """

    extra: str
    packages: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    works: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def extras() -> list[str]:
    """The project's extras but those that gather others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [name for name in project["optional-dependencies"] if name not in GATHERED]


def python(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / "bin" / "python"


def pip(environment: Path, *words: str) -> str:
    """Run an environment's pip; returns its output.

    Raises:
        RuntimeError: It failed; the message is its last line.
    """
    command = [str(python(environment)), "-m", "pip", "--disable-pip-version-check", *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError((answer.stderr.strip().splitlines() or ["pip failed"])[-1])
    return answer.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    """A wheel of the project, built from a copy, so that nothing is written into the checkout."""
    copy = folder / "source"
    unwanted = ignore_patterns("*.egg-info", "__pycache__", "build")
    copytree(source / "src", copy / "src", ignore=unwanted, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((source / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return max(folder.glob("preln-*.whl"), key=os.path.getmtime)


def make_core(environment: Path, wheel: Path, torch: str) -> None:
    """A fresh environment with torch and the project without extras."""
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip(environment, "install", "--quiet", "--no-compile", f"torch=={torch}")
    pip(environment, "install", "--quiet", "--no-compile", str(wheel))


def add_extra(core: Path, environment: Path, wheel: Path, extra: str) -> None:
    """A copy of the first environment by hard links, with one extra; pip never edits a file in place."""
    subprocess.run(["cp", "-al", str(core), str(environment)], check=True)
    pip(environment, "install", "--quiet", "--no-compile", f"preln[{extra}] @ {wheel.as_uri()}")


def look(environment: Path, extra: str, folder: Path) -> Installed:
    """Try every command that an environment should carry out, and every one that it should refuse."""
    found = Installed(extra)
    versions = {
        p["name"].lower(): p["version"] for p in json.loads(pip(environment, "list", "--format", "json"))
    }
    found.packages = len(versions)
    named = (
        "torch",
        "transformers",
        "peft",
        "lm_eval",
        "lm-eval",
        "sympy",
        "matplotlib",
        "tensorboard",
        "ray",
    )
    found.versions = {name.replace("_", "-"): versions[name] for name in named if name in versions}
    if UNWANTED in versions:
        found.failures.append(f"{UNWANTED} {versions[UNWANTED]} is installed")
    for case in CASES:
        if extra and not case.extra:
            continue  # tried without any extra, with fewer packages
        code, line = _try(environment, case, extra, folder)
        kept = found.failures if line else (found.refused if code else found.works)
        kept.append(line or case.name)
    return found


def _try(environment: Path, case: Case, extra: str, folder: Path) -> tuple[int, str]:
    """A command's exit code, and what is wrong with its outcome; empty if nothing is."""
    told = {"out": folder / f"{extra or 'none'}-{CASES.index(case)}", "run": folder / "run"}
    told["study"] = folder / "study.yaml"
    for path in (told["out"], *([told["run"]] if case.name == "run" else [])):
        rmtree(path, ignore_errors=True)  # of a former call in the same folder
    words = [word.format(**told) for word in case.words]
    command = [str(python(environment)), "-W", "ignore", "-m", "preln.cli", *words]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    answer = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=folder, check=False)
    code, lines = answer.returncode, answer.stderr.strip().splitlines() or [""]
    if code == 0:  # perhaps since another extra brings what it needs, as lm-eval brings peft
        return code, ""
    if case.extra in ("", extra):
        return code, f"{case.name}: exit {code}: {lines[-1]}"
    if code != 2 or len(lines) != 1 or f"preln[{case.extra}]" not in lines[0]:
        return code, f"{case.name}: exit {code}, {len(lines)} lines: {lines[-1]}"
    return code, f"{case.name}: refused, but it left files" if told["out"].exists() else ""


def table(rows: Sequence[Installed]) -> str:
    """The environments as a Markdown table."""
    lines = [
        "| extra | packages | its commands work | others name their extra | otherwise |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        works = ", ".join(f"`{name}`" for name in row.works) or "–"
        failures = "; ".join(row.failures).replace("|", "\\|") or "–"
        lines.append(
            f"| {row.extra or 'none'} | {row.packages} | {works} | {len(row.refused)} | {failures} |"
        )
    return "\n".join(lines)


def run(chosen: Sequence[str], folder: Path, torch: str, source: Path = ROOT) -> list[Installed]:
    """Build, install and try; environments that are there already are used as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    small = study("tiny:llama:6") | {"name": "installs", "hypotheses": []}
    (folder / "study.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    wheel = build_wheel(source, folder)
    core, rows = folder / "core", []
    for name in chosen:
        extra = "" if name == NONE else name
        environment = folder / extra if extra else core
        try:
            if environment.is_dir():
                pip(
                    environment,
                    "install",
                    "--quiet",
                    "--no-compile",
                    "--no-deps",
                    "--force-reinstall",
                    str(wheel),
                )
            elif extra:
                if not core.is_dir():
                    make_core(core, wheel, torch)
                add_extra(core, environment, wheel, extra)
            else:
                make_core(core, wheel, torch)
            rows.append(look(environment, extra, folder))
        except RuntimeError as error:
            rows.append(Installed(extra, failures=[f"does not install: {error}"]))
        print(f"{name}: {rows[-1].failures or 'as it should be'}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Install, try, print the table; 1 where something went otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known = [NONE, *extras()]
    parser.add_argument("--extras", nargs="+", default=known, choices=known)
    parser.add_argument("--torch", default="2.13.0", help="default: %(default)s")
    parser.add_argument("--source", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--folder", type=Path, help="for the environments, which stay there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(arguments.extras, arguments.folder or Path(scratch), arguments.torch, arguments.source)
    print(json.dumps([vars(row) for row in rows]) if arguments.json else table(rows))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
