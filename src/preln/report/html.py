"""One self-contained page: no network, no second file, everything from data escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from preln.base.errors import require
from preln.report import views
from preln.report.compare import side_by_side
from preln.report.costs import cost_view
from preln.report.explorer import explorer
from preln.report.figures import Exhibit
from preln.report.healing_exhibits import shown_outcomes
from preln.report.healing_means import crowded
from preln.report.ledger_view import flatten, ledger_views
from preln.report.load import Run
from preln.report.pairing import paired_view
from preln.report.style import inline_svg
from preln.report.summary import outcomes, tasks
from preln.theory.ledger import family_rows

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("script.js", "panels.js", "explorer.js")


def render_page(runs: Sequence[tuple[Run, list[Exhibit]]], out: Path) -> str:
    """The page for one or several runs.

    Figures stand in it as inline SVG, in a wide and a narrow drawing of which the style sheet shows one. The
    content security policy admits the page's own script by its hash and nothing else, so that even markup
    that got past the escaping could not run.

    Args:
        runs: the runs to show with their figures, one section each.
        out: the folder that the page will lie in; links to the runs' files are relative to it.

    Returns:
        The HTML.
    """
    jinja2 = require("jinja2", extra="report")
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views_of = [_run_view(run, shown, f"r{i}", out) for i, (run, shown) in enumerate(runs, 1)]
    # The hash must be of the script as it stands between its tags, so the template adds nothing around it.
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8").strip() for name in SCRIPTS)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8").strip()
    return environment.get_template("index.html.j2").render(
        runs=views_of,
        compared=side_by_side([run for run, _ in runs], views_of),
        explorer=explorer([run for run, _ in runs]),
        title=_title([run for run, _ in runs]),
        signs=views.SIGNS,
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


def _title(runs: Sequence[Run]) -> str:
    return "preln report: " + ", ".join(dict.fromkeys(run.name for run in runs))


def _run_view(run: Run, shown: list[Exhibit], prefix: str, out: Path) -> dict[str, Any]:
    ledger = ledger_views(run, prefix)
    return {
        "prefix": prefix,
        "name": run.name,
        "question": str(run.config.get("question") or ""),
        "unfinished": run.manifest.get("status") not in (None, "finished"),
        "summary": views.summary(run),
        "verdicts": views.verdict_views(run, prefix),
        "outcomes": views.outcome_rows(shown_outcomes(run)),
        "each_outcome": views.outcome_rows(outcomes(run)) if crowded(run) else [],
        "tasks": views.task_grid(tasks(run)),
        "paired": paired_view(run),
        "costs": cost_view(run),
        "no_pairs": run.layers is not None and (run.pairs is None or not len(run.pairs)),
        "families": family_rows(run.claims),
        "ledger": ledger,
        "statuses": list(dict.fromkeys(entry["status"] for entry in ledger)),
        "kinds": list(dict.fromkeys(entry["kind"] for entry in ledger)),
        "evidence": sorted({kind for entry in ledger for kind in entry["kinds"]}),
        "figures": [_figure_view(exhibit, prefix) for exhibit in shown],
        "agreement": views.agreement_rows(run),
        "manifest": list(flatten(run.manifest)),
        "config": yaml.safe_dump(run.config, allow_unicode=True, sort_keys=False, width=100)
        if run.config
        else "",
        "steps": views.step_views(run, prefix, out),
    }


def _figure_view(exhibit: Exhibit, prefix: str) -> dict[str, Any]:
    from markupsafe import Markup

    spec = exhibit.spec
    drawings = {
        width: Markup(inline_svg(drawing, prefix=f"{prefix}-{spec.name}-{width}"))
        for width, drawing in exhibit.drawings.items()
    }
    return {
        **{
            "id": f"{prefix}-fig-{spec.name}",
            "name": spec.name,
            "title": spec.title,
            "caption": spec.caption,
        },
        **{"alt": exhibit.alt, "numbers": views.numbers(exhibit.table), **drawings},
    }
