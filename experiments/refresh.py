"""Commit a finished run: export it without weights, redraw the pictures of docs, fill the README's tables.

Usage: python experiments/refresh.py runs/quickstart
       python experiments/refresh.py --probe runs/smollm2-probe     (the folder of a `preln probe`)
       python experiments/refresh.py --healing runs/healing         (a run of experiments/healing/*.yaml)
       python experiments/refresh.py --study runs/uidl-smollm2-135m  (a run of any other study)
       python experiments/refresh.py --scores runs/smollm2-scores   (of a `preln score --damage`)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from preln.base.errors import InputError
from preln.base.files import read_json, write_text
from preln.experiment.export import export_run
from preln.experiment.published import published_table, read_published
from preln.report import (
    beside_published,
    build_report,
    findings,
    healing_study,
    placement_figures,
    probe_page,
    selection,
)
from preln.report.collapse_figures import collapse_curves, collapse_table
from preln.report.distance_figures import pair_distances, windows
from preln.report.jacobian_figures import jacobian_bounds, logit_lens
from preln.report.load import load_run
from preln.report.markdown import fill, refresh_readme
from preln.report.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_RUN = "reassessing-smollm2-135m"  # the run that repeats the published comparison
WINDOW_RUN = "uidl-smollm2-135m"  # the run that removes windows of every size
PICTURES = ("depth-profile", "theory-initialisation", "theory-growth", "theory-mutants")


def main(run: str) -> int:
    """Refresh everything that is made from ``run``."""
    results = export_run(run, ROOT / "experiments" / "results" / Path(run).name)
    with tempfile.TemporaryDirectory() as scratch:
        build_report([results], Path(scratch) / "report")
        (ROOT / "docs").mkdir(exist_ok=True)
        for name in PICTURES:
            picture = Path(scratch) / "report" / "figures" / f"{name}-double.png"
            shutil.copyfile(picture, ROOT / "docs" / f"{name.replace('-', '_')}.png")
    refresh_readme(ROOT / "README.md", load_run(results))
    return 0


def keep(folder: str) -> Path:
    """Copy a folder that a command wrote to the committed results.

    Raises:
        InputError: It was made from uncommitted code.
    """
    if read_json(Path(folder) / "manifest.json")["git"]["dirty"] is not False:
        raise InputError(f"{folder}: made from uncommitted code: commit, and run again")
    results = ROOT / "experiments" / "results" / Path(folder).name
    shutil.copytree(folder, results, dirs_exist_ok=True)
    return results


def draw(name: str, figure: Figure) -> None:
    """Store a picture of docs."""
    (ROOT / "docs" / f"{name}.png").write_bytes(render(figure, "png"))


def probe(folder: str) -> int:
    """Refresh the page of the probe from the folder that ``preln probe`` wrote."""
    results = keep(folder)
    layers = pd.read_parquet(results / "layers.parquet")
    draw("jacobian_bounds", jacobian_bounds(layers, width="double"))
    draw("logit_lens", logit_lens(layers, width="double"))
    page = ROOT / "docs" / "probe.md"
    write_text(page, fill(page, probe_page.parts(results)))
    return 0


def scores(folder: str) -> int:
    """Refresh the page of criteria, and README's table of systems, from what ``preln score`` wrote."""
    results = keep(folder)
    draw(
        "selection_damage",
        selection.selection_damage(pd.read_parquet(results / "damage.parquet"), width="double"),
    )
    page, readme = ROOT / "docs" / "criteria.md", ROOT / "README.md"
    write_text(page, fill(page, selection.parts(results)))
    write_text(readme, fill(readme, {"systems": selection.systems()}))
    return 0


def healing(folder: str) -> int:
    """Refresh the page of healing from a study of recipes."""
    results = export_run(folder, ROOT / "experiments" / "results" / Path(folder).name)
    draw("healing_study", healing_study.healing_study(load_run(results)))
    page = ROOT / "docs" / "healing-study.md"
    write_text(page, fill(page, healing_study.parts(results)))
    return 0


def study(folder: str) -> int:
    """Refresh the page of findings from a study, and the table beside the published numbers."""
    results = export_run(folder, ROOT / "experiments" / "results" / Path(folder).name)
    page = ROOT / "docs" / "findings.md"
    parts = findings.parts(results.parent)
    beside = results.parent / PUBLISHED_RUN
    if beside.is_dir():
        source = ROOT / "experiments" / "published" / "reassessing.yaml"
        caveats = read_published(source).caveats
        told = beside_published.beside(
            load_run(beside), published_table([source]), caveats, healed_by="partial-3"
        )
        parts["published"] = told
    run = load_run(results)
    if (table := placement_figures.run_table(run)) is not None:
        draw("norm_placement", placement_figures.norm_placement(table))
    if run.name == WINDOW_RUN and run.pairs is not None:
        draw("uidl_collapse", collapse_curves(collapse_table(run)))
        draw("uidl_distances", pair_distances(run.pairs, windows(run), width="double"))
    write_text(page, fill(page, parts))
    return 0


KINDS = {"--probe": probe, "--scores": scores, "--healing": healing, "--study": study}

if __name__ == "__main__":
    try:
        sys.exit(KINDS[sys.argv[1]](sys.argv[2]) if sys.argv[1] in KINDS else main(sys.argv[1]))
    except InputError as error:
        sys.exit(f"refresh: {error}")
