"""What a run found, as Markdown: for a README whose every number comes from stored results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import write_text
from preln.report.load import Run
from preln.report.summary import hypothesis_name, outcomes


def findings(run: Run) -> str:
    """Theorems that fell and what holds instead, verdicts, and losses before and after healing.

    Args:
        run: A finished run; see :func:`preln.report.load.load_run`.
    """
    return "\n\n".join([_theorems(run), _verdicts(run), _outcomes(run)])


def cell(text: object) -> str:
    """Text inside a table cell."""
    # An underscore between signs would begin emphasis.
    return " ".join(str(text).split()).replace("|", "\\|").replace("|_", "|\\_")


def _theorems(run: Run) -> str:
    theorems = [c for c in run.claims if c["kind"] == "theorem"]
    count = {s: sum(c["status"] == s for c in theorems) for s in ("proved", "refuted", "open")}
    lines = [
        f"**Theorems: {count['proved']} proved, {count['refuted']} refuted, {count['open']} open.** "
        "False as they stand:",
        "",
        "| claim | statement | counterexample | what holds |",
        "|---|---|---|---|",
    ]
    for claim in theorems:
        if claim["status"] != "refuted":
            continue
        found = [e["detail"] for e in claim["evidence"] if e["kind"] == "counterexample"]
        holds = [f"`{found[0]['corrected_by']}`"] if found[0].get("corrected_by") else []
        text = "; ".join([*holds, found[0].get("sharp_condition", "")])
        lines.append(
            f"| `{claim['id']}` | {cell(claim['statement'])} | {cell(_example(found[0]))} | {cell(text)} |"
        )
    return "\n".join(lines)


def _example(detail: dict[str, Any]) -> str:
    """The numbers of a counterexample, such as ``x = (1, -1), eps = 9/16: sigma = 4/5, claimed = 16/25``."""

    def listed(values: dict[str, Any]) -> str:
        shown = {k: v for k, v in values.items() if k not in ("layer", "layers")}
        return ", ".join(f"{key} = {_exact(value)}" for key, value in shown.items())

    return f"{listed(detail.get('instance', {}))}: {listed(detail.get('values', {}))}"


def _exact(value: Any) -> str:
    """A number, or a list of them in brackets, as stored: exact."""
    return f"({', '.join(map(_exact, value))})" if isinstance(value, list) else str(value)


def _verdicts(run: Run) -> str:
    model, data = run.manifest["model"], run.manifest["data"]["evaluation"]
    source = run.config["data"]["evaluation"]["source"]
    lines = [
        f"**Hypotheses on {model['name']}** ({model['blocks']} blocks, {run.manifest['dtype']}, "
        f"{data['shape'][0]} × {data['shape'][1]} held-out tokens of {source}; "
        "rule fixed before the run, 95 % bootstrap interval):",
        "",
        "| hypothesis | verdict | statistic | value [interval] | holds if |",
        "|---|---|---|---|---|",
    ]
    for v in run.verdicts:
        interval = f" [{v['interval'][0]:.3g}, {v['interval'][1]:.3g}]" if v["interval"] else ""
        value = "–" if v["value"] is None else f"{v['value']:.3g}{interval}"
        lines.append(
            f"| `{hypothesis_name(v)}` {cell(v['statement'])} | **{v['status']}** | {cell(v['meaning'])} | "
            f"{value} | {v['expected']} |"
        )
    return "\n".join(lines)


def _outcomes(run: Run) -> str:
    lines = [
        "**Loss on held-out text** (nats a token), blocks counted from 0:",
        "",
        "| model | blocks removed | loss [95 %] | healing tokens | learning rate |",
        "|---|---|---|---|---|",
    ]
    for row in outcomes(run).to_dict("records"):
        name = row["stage"] if row["stage"] == "dense" else row["metric"]
        if row["stage"] == "healed":
            name = f"{name} + {row['recipe']}"
        interval = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
        tokens = f"{int(row['tokens']):,}" if row["stage"] == "healed" else "–"
        rate = f"{row['learning_rate']:g}" if row["stage"] == "healed" else "–"
        blocks = row["blocks"] if isinstance(row["blocks"], str) and row["blocks"] else "–"
        lines.append(f"| {cell(name)} | {blocks} | {row['loss']:.3f}{interval} | {tokens} | {rate} |")
    return "\n".join(lines)


def fill(path: str | Path, parts: dict[str, str]) -> str:
    """The text of a page with the parts between its markers made anew.

    Args:
        path: The page.
        parts: By name, what goes between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        InputError: The page lacks the markers of a part.
    """
    text = Path(path).read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"{path}: the markers {begin} and {end} are missing: put them back")
        text = pattern.sub(lambda _, b=begin, p=part, e=end: f"{b}\n{p}\n{e}", text)
    return text


def fill_readme(path: str | Path, run: Run) -> str:
    """The text of a README with the part between its two markers made anew.

    Raises:
        InputError: The file has no markers.
    """
    return fill(path, {"found": findings(run)})


def refresh_readme(path: str | Path, run: Run) -> Path:
    """Write :func:`fill_readme`'s text back, atomically."""
    return write_text(path, fill_readme(path, run))
