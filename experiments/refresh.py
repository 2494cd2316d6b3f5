"""Commit a finished run: export it without weights, redraw the pictures of docs, fill the README's tables.

Usage: python experiments/refresh.py runs/quickstart
       python experiments/refresh.py --probe runs/smollm2-probe   (the folder of a `preln probe`)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from preln.base.errors import InputError
from preln.base.files import read_json, write_text
from preln.experiment.export import export_run
from preln.report import build_report
from preln.report.jacobian_figures import jacobian_bounds, logit_lens
from preln.report.load import load_run
from preln.report.markdown import fill, refresh_readme
from preln.report.probe_page import parts
from preln.report.style import render

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


def probe(folder: str) -> int:
    """Refresh the page of the probe from the folder that ``preln probe`` wrote."""
    if read_json(Path(folder) / "manifest.json")["git"]["dirty"] is not False:
        print(f"refresh: {folder}: made from uncommitted code: commit, and probe again", file=sys.stderr)
        return 2
    results = ROOT / "experiments" / "results" / Path(folder).name
    shutil.copytree(folder, results, dirs_exist_ok=True)
    layers = pd.read_parquet(results / "layers.parquet")
    for name, draw in (("jacobian_bounds", jacobian_bounds), ("logit_lens", logit_lens)):
        (ROOT / "docs" / f"{name}.png").write_bytes(render(draw(layers, width="double"), "png"))
    page = ROOT / "docs" / "probe.md"
    write_text(page, fill(page, parts(results)))
    return 0


if __name__ == "__main__":
    sys.exit(probe(sys.argv[2]) if sys.argv[1] == "--probe" else main(sys.argv[1]))
