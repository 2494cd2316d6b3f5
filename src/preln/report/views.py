"""What the page shows of a run, as plain data for the template: text and numbers, no markup."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from preln.report.healing_exhibits import shown_outcomes
from preln.report.load import STATUSES_OF_HYPOTHESES, STATUSES_OF_THEOREMS, Run
from preln.report.summary import agreement, dense_loss, hypothesis_name, interval
from preln.report.tables import number
from preln.report.typeset import typeset

SIGNS = {
    "proved": "✓",
    "refuted": "✗",
    "open": "?",
    "supported": "✓",
    "unsupported": "✗",
    "inconclusive": "~",
    "untested": "–",
}

_VERDICT_TEXTS = ("id", "status", "statistic", "expected")
_VERDICT_FORMULAS = ("statement", "meaning", "note")


def slug(text: str) -> str:
    """Text as part of an id or a file name: letters, digits and hyphens only."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "x"


def status_class(status: Any) -> str:
    """The status if it is one of the vocabulary, else `other`: a class name never comes from data."""
    return status if status in SIGNS else "other"


def counts(run: Run) -> list[tuple[str, str, int]]:
    """How many theorems and hypotheses ended how: (kind, status, count), zero counts left out."""
    groups = (
        ("theorem", STATUSES_OF_THEOREMS, [c for c in run.claims if c.get("kind", "theorem") == "theorem"]),
        ("hypothesis", STATUSES_OF_HYPOTHESES, list(run.verdicts)),
    )
    found = []
    for kind, statuses, records in groups:
        for status in statuses:
            count = sum(record["status"] == status for record in records)
            if count:
                found.append((kind, status, count))
    return found


def model_name(run: Run) -> str:
    """The model's name, from the manifest or else from the study."""
    model = run.manifest.get("model", run.config.get("model"))
    if isinstance(model, dict):
        model = next(
            (model[key] for key in ("name", "id", "source") if model.get(key)), run.config.get("model")
        )
    return str(model) if model else "an unnamed model"


def summary(run: Run) -> str:
    """One paragraph: what was studied, what was decided, what pruning and healing did."""
    where = [str(run.manifest[key]) for key in ("dtype", "device") if run.manifest.get(key)]
    parts = [f"{model_name(run)} ({', '.join(where)})." if where else f"{model_name(run)}."]
    theorems = [f"{n} {status}" for kind, status, n in counts(run) if kind == "theorem"]
    hypotheses = [f"{n} {status}" for kind, status, n in counts(run) if kind == "hypothesis"]
    if theorems:
        parts.append(f"Theorems: {', '.join(theorems)}.")
    if hypotheses:
        parts.append(f"Hypotheses on this model: {', '.join(hypotheses)}.")
    table, dense = shown_outcomes(run), dense_loss(run)
    if dense is not None:
        parts.append(f"The whole model's loss is {number(dense)} nats a token.")
    for stage, words in (("pruned", "before healing"), ("healed", "after healing")):
        rows: pd.DataFrame = table.loc[(table["stage"] == stage) & table["loss"].notna()]
        if len(rows):
            best, worst = rows.loc[rows["loss"].idxmin()], rows.loc[rows["loss"].idxmax()]
            parts.append(
                f"Pruned models {words} lie between {number(best['loss'])} ({_how(best)}) "
                f"and {number(worst['loss'])} ({_how(worst)})."
            )
    return " ".join(parts)


def verdict_views(run: Run, prefix: str) -> list[dict[str, Any]]:
    """The verdicts as cards; evidence links to the file's row under provenance if the run has the file."""
    vouched = {f"{step.folder.name}/{name}" for step in run.steps for name in step.files}
    cards = []
    for place, verdict in enumerate(run.verdicts, 1):
        low, high = interval(verdict)
        links = [
            {"text": str(name), "href": f"#{prefix}-file-{slug(str(name))}" if name in vouched else None}
            for name in verdict.get("evidence") or []
        ]
        cards.append(
            {
                **{key: str(verdict.get(key) or "") for key in _VERDICT_TEXTS},
                **{key: typeset(str(verdict.get(key) or "")) for key in _VERDICT_FORMULAS},
                "name": hypothesis_name(verdict),
                "anchor": f"{prefix}-verdict-{place}",
                "class": status_class(verdict["status"]),
                "evidence": links,
                "value_text": number(verdict.get("value")),
                "interval_text": "–"
                if math.isnan(low) or math.isnan(high)
                else f"{number(low)} to {number(high)}",
                "threshold_text": number(verdict.get("threshold")),
                "n_text": number(verdict.get("n")),
                "gauge": gauge(verdict.get("value"), low, high, verdict.get("threshold")),
            }
        )
    return cards


def gauge(value: Any, low: float, high: float, threshold: Any) -> dict[str, float] | None:
    """Positions from 0 to 100 of value, interval and threshold on a common line; None without all of them."""
    numbers = [value, low, high, threshold]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        return None
    least, most = min(numbers), max(numbers)
    span = (most - least) or 1.0
    spots = [8 + 84 * (v - least) / span for v in numbers] if most > least else [50.0] * 4
    return dict(zip(("value", "low", "high", "threshold"), (round(spot, 2) for spot in spots), strict=True))


def outcome_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The outcome table as text, with the rise over the dense loss and marks on the best of each stage."""
    best: Any = table.groupby("stage")["loss"].min()  # a Series, typed as a scalar too
    rows = []
    for row in table.to_dict("records"):
        rows.append(
            {
                **{key: row[key] for key in ("stage", "metric", "recipe", "blocks")},
                **{
                    key: number(row[key])
                    for key in ("removed", "perplexity", "trainable_parameters", "tokens")
                },
                **{"loss": number(row["loss"]), "seconds": number(row["seconds"], 3)},
                "learning_rate": number(row["learning_rate"]),
                "interval": "–"
                if math.isnan(row["low"])
                else f"{number(row['low'])} to {number(row['high'])}",
                "rise": "–" if row["stage"] == "dense" else f"{row['loss'] - row['dense_loss']:+.3f}",
                "best": row["stage"] != "dense" and row["loss"] == best[row["stage"]],
            }
        )
    return rows


def task_grid(table: pd.DataFrame) -> dict[str, Any] | None:
    """Accuracy by model and task as text, with the plain mean over tasks; None without evaluations.

    Args:
        table: as :func:`preln.report.summary.tasks` makes it, of one run or of several with other names.
    """
    if not len(table):
        return None
    names = sorted(table["task"].unique())
    rows = []
    for model, group in table.groupby("model", sort=False):
        cells = group.set_index("task")
        row = [_accuracy(cells.loc[name]) if name in cells.index else "–" for name in names]
        # a mean over fewer tasks than the others have would not compare
        accuracy = cells.loc[:, "acc"]
        mean = f"{accuracy.mean():.3f}" if len(cells) == len(names) and accuracy.notna().all() else "–"
        rows.append({"model": str(model), "cells": row, "mean": mean})
    return {"names": names, "rows": rows}


def agreement_rows(run: Run) -> list[dict[str, Any]]:
    """Rank correlation of every metric's scores with the measured damage, as text."""
    if run.scores is None or run.damage is None:
        return []
    return [
        {
            "metric": row["metric"],
            "rank correlation with damage": number(row["rank_correlation"], 2),
            "blocks": row["n"],
        }
        for row in agreement(run.scores, run.damage).to_dict("records")
    ]


def numbers(table: pd.DataFrame) -> dict[str, list[Any]]:
    """A figure's numbers as text; columns that say nothing are left out."""
    shown = table[
        [
            column
            for column in table.columns
            if table.loc[:, column].notna().any() and not (table.loc[:, column] == "").all()
        ]
    ]
    rows = [[number(value) for value in row] for row in shown.astype(object).itertuples(index=False)]
    return {"columns": [str(column) for column in shown.columns], "rows": rows}


def step_views(run: Run, prefix: str, out: Path) -> list[dict[str, Any]]:
    """Steps with their files, hashes and a link to each file relative to the page."""
    views = []
    for step in run.steps:
        files = []
        for name, digest in step.files.items():
            path = f"{step.folder.name}/{name}"
            relative = os.path.relpath(run.path.resolve() / path, out.resolve())
            href = quote(Path(relative).as_posix())
            files.append({"path": path, "id": f"{prefix}-file-{slug(path)}", "href": href, "sha256": digest})
        views.append({"id": step.id, "kind": step.kind, "seconds": number(step.seconds, 3), "files": files})
    return views


def _accuracy(row: pd.Series) -> str:
    acc, error = row.loc["acc"], row.loc["acc_stderr"]
    if math.isnan(acc):
        return "–"
    return f"{acc:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _how(row: pd.Series) -> str:
    return ", ".join(name for name in (row.loc["metric"], row.loc["recipe"]) if name)
