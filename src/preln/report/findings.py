"""What all committed studies found: every hypothesis beside every study that spoke to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from preln.base.errors import InputError
from preln.report.load import Run, load_run
from preln.report.markdown import cell
from preln.report.summary import interval

COLUMNS = ["id", "statement", "study", "model", "status", "statistic", "value", "low", "high", "n", "note"]
MANY = 4  # verdicts of one study on one hypothesis beyond which they are counted
SHOWN = {"supported": "holds", "unsupported": "does not hold", "inconclusive": "undecided", "untested": "–"}
SHOWN |= {f"{name} where decided": f"{SHOWN[name]} where decided" for name in ("supported", "unsupported")}


def verdict_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a verdict: ``COLUMNS``, in the order of the runs."""
    rows = []
    for run in runs:
        for verdict in run.verdicts:
            low, high = interval(verdict)
            told = {name: verdict.get(name) for name in ("id", "statement", "model", "status", "statistic")}
            told |= {"value": verdict["value"], "low": low, "high": high, "n": verdict["n"]}
            rows.append({**told, "study": run.name, "note": verdict["note"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def overall(statuses: Sequence[str]) -> str:
    """One word for several verdicts on one hypothesis.

    >>> overall(["supported", "inconclusive"]), overall(["supported", "unsupported"]), overall(["untested"])
    ('supported where decided', 'mixed', 'untested')
    """
    decided = {status for status in statuses if status in ("supported", "unsupported")}
    if len(decided) == 2:
        return "mixed"
    if decided:
        return decided.pop() + (" where decided" if "inconclusive" in statuses else "")
    return "inconclusive" if "inconclusive" in statuses else "untested"


def matrix(table: pd.DataFrame) -> str:
    """Markdown: one row a hypothesis, one column a study, and one word over all of them."""
    studies = list(dict.fromkeys(table["study"]))
    lines = [
        "| hypothesis | " + " | ".join(studies) + " | over all |",
        "|---" * (len(studies) + 2) + "|",
    ]
    for name, own in _grouped(table, "id"):
        statement = cell(own["statement"].iloc[0])
        cells = [_told(own[own["study"] == study]) for study in studies]
        word = overall(list(own["status"]))
        lines.append(f"| `{name}` {statement} | " + " | ".join(cells) + f" | **{SHOWN.get(word, word)}** |")
    return "\n".join(lines)


def verdicts(run: Run) -> str:
    """Markdown: what one study decided, with its budget in front."""
    manifest = run.manifest
    data = manifest["data"]
    shapes = ", ".join(f"{name} {' × '.join(map(str, part['shape']))}" for name, part in data.items())
    model = manifest["model"]
    budget = (
        f"{cell(run.config.get('question', ''))} {model['name']}, {manifest['dtype']} on "
        f"{manifest['device']}; tokens: {shapes}; {len(run.steps)} steps, "
        f"{sum(step.seconds or 0.0 for step in run.steps) / 60:.0f} minutes."
    )
    return f"{budget}\n\n{verdict_rows(run)}"


def verdict_rows(run: Run) -> str:
    """Markdown: the verdicts of one study, with the rule that each was decided by and what was found."""
    lines = [
        "| hypothesis | on | verdict | statistic | value [95 %] | holds if | what was found |",
        "|---|---|---|---|---|---|---|",
    ]
    for verdict in run.verdicts:
        low, high = interval(verdict)
        value = "–" if verdict["value"] is None else f"{verdict['value']:+.3f}"
        value += f" [{low:+.3f}, {high:+.3f}]" if verdict["interval"] else ""
        on = f"`{verdict['model']}`" if verdict.get("model") else ""
        lines.append(
            f"| `{verdict['id']}` | {on} | **{SHOWN[verdict['status']]}** | {cell(verdict['meaning'])} | "
            f"{value} | {verdict['expected']} | {cell(verdict['note'])} |"
        )
    return "\n".join(lines)


def read_runs(results: str | Path) -> list[Run]:
    """Every committed run that decided something, by name.

    Raises:
        InputError: There is none.
    """
    folders = [path.parent for path in sorted(Path(results).glob("*/manifest.json"))]
    runs = [load_run(folder) for folder in folders if (folder / "decide").is_dir()]
    if not runs:
        raise InputError(f"{results}: holds no run with verdicts: export one first")
    return runs


def parts(results: str | Path) -> dict[str, str]:
    """The generated parts of the page of findings, by the name of their markers."""
    runs = read_runs(results)
    each = {f"study-{run.name}": verdicts(run) for run in runs}
    return {"findings": matrix(verdict_table(runs)), **each}


def _grouped(table: pd.DataFrame, by: str) -> Any:
    return table.groupby(by, sort=False)


def _told(rows: pd.DataFrame) -> str:
    """The verdicts of one study on one hypothesis, each pruned model named where there are several."""
    if len(rows) > MANY:
        counts = rows["status"].value_counts()
        return ", ".join(f"{counts[status]} × {word}" for status, word in SHOWN.items() if status in counts)
    told = []
    for row in rows.to_dict("records"):
        name = f" ({row['model']})" if row["model"] and len(rows) > 1 else ""
        told.append(f"{SHOWN[row['status']]}{name}")
    return (
        ", ".join(told) if len(set(rows["status"])) > 1 else (SHOWN[rows["status"].iloc[0]] if told else "")
    )
