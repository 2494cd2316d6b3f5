"""Commit a finished run: export it without weights, redraw the pictures of docs, fill the README's tables.

Usage: python experiments/refresh.py runs/quickstart
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from preln.base.errors import InputError
from preln.experiment.export import export_run
from preln.report import build_report
from preln.report.load import load_run
from preln.report.markdown import refresh_readme

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ("depth-profile", "theory-initialisation", "theory-growth", "theory-mutants")


def main(run: str) -> int:
    """Refresh everything that is made from ``run``."""
    try:
        results = export_run(run, ROOT / "experiments" / "results" / Path(run).name)
    except InputError as error:
        print(f"refresh: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        build_report([results], Path(scratch) / "report")
        (ROOT / "docs").mkdir(exist_ok=True)
        for name in PICTURES:
            picture = Path(scratch) / "report" / "figures" / f"{name}-double.png"
            shutil.copyfile(picture, ROOT / "docs" / f"{name.replace('-', '_')}.png")
    refresh_readme(ROOT / "README.md", load_run(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
