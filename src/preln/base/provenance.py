"""Where a result came from: versions, commit, machine, time; no paths and no secrets."""

from __future__ import annotations

import datetime
import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "sympy",
    "sacrebleu",
    "z3-solver",
    "hypothesis",
    "peft",
    "lm-eval",
    "datasets",
)


def package_versions() -> dict[str, str]:
    """Installed versions of this project and of the packages whose version can change a number."""
    from preln import __version__

    versions = {"preln": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def source_hash() -> str:
    """SHA-256 over the source files of this project."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it has uncommitted changes; both None outside a checkout."""
    here = Path(__file__).resolve().parent

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    tracked = ask("ls-files", "--error-unmatch", Path(__file__).name)
    if tracked is None:  # installed inside somebody else's checkout, or in none
        return {"commit": None, "dirty": None}
    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(status)}


def now() -> str:
    """The present moment in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance(**extra: Any) -> dict[str, Any]:
    """A manifest's first part: schema version, packages, git state, machine, start time, and ``extra``."""
    return {
        "schema_version": 1,
        "packages": package_versions(),
        "git": git_state(),
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "start": now(),
        **extra,
    }
