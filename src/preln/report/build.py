"""Build the report: everything is read, checked and drawn before the first file is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from preln.base.errors import InputError
from preln.base.files import write_bytes
from preln.base.progress import track
from preln.report.figures import Exhibit, exhibits
from preln.report.html import render_page
from preln.report.load import Run, load_run
from preln.report.run_tables import run_tables
from preln.report.style import render
from preln.report.tables import csv
from preln.report.views import slug


def build_report(runs: Sequence[Path | str], out: Path | str, *, figures: bool = True) -> Path:
    """Write the page, the tables and the figures of one or several runs.

    The same runs give the same bytes, except that links to the runs' files depend on where `out` lies.

    Args:
        runs: run folders.
        out: folder to write to; files of the same names in it are replaced, each atomically.
        figures: also write `figures/*.{pdf,png,csv}`; the page holds its figures in any case.

    Returns:
        The path of `index.html`.

    Raises:
        InputError: no run is named, a folder is no run, a file in it is damaged, or `out` cannot be written.
    """
    if not runs:
        raise InputError("no run is named: name at least one folder that `preln run` wrote")
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file: name a folder for the report")
    loaded = [load_run(run) for run in runs]
    files: dict[str, bytes] = {}
    shown: list[tuple[Run, list[Exhibit]]] = []
    for run, prefix in zip(loaded, _prefixes(loaded), strict=True):
        shown.append((run, exhibits(run)))
        for name, text in run_tables(run).items():
            files[f"tables/{prefix}{name}"] = text.encode("utf-8")
        if figures:
            files |= {
                f"figures/{prefix}{name}": content for name, content in _figure_files(*shown[-1]).items()
            }
    # last, so that a page never stands beside figures of an earlier build
    files["index.html"] = render_page(shown, target).encode("utf-8")
    try:
        for name, content in files.items():
            write_bytes(target / name, content)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): name another --out") from error
    return target / "index.html"


def _figure_files(run: Run, shown: list[Exhibit]) -> dict[str, bytes]:
    """Each figure at both column widths as PDF and PNG, and its numbers as CSV."""
    files: dict[str, bytes] = {}
    for exhibit in track(shown, label=f"figures of {run.name}"):
        spec = exhibit.spec
        files[f"{spec.name}.csv"] = csv(exhibit.table).encode("utf-8")
        for width, drawing in exhibit.drawings.items():
            for kind in ("pdf", "png"):
                files[f"{spec.name}-{width}.{kind}"] = render(drawing, kind)
    return files


def _prefixes(runs: Sequence[Run]) -> list[str]:
    """What file names of each run begin with: nothing for a single run, else a name of its own."""
    if len(runs) == 1:
        return [""]
    taken: list[str] = []
    for run in runs:
        base, name, count = slug(run.name), slug(run.name), 1
        while f"{name}-" in taken:
            count += 1
            name = f"{base}-{count}"
        taken.append(f"{name}-")
    return taken
