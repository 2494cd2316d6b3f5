"""The published comparison of criteria, repeated: its table and its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from preln.report.beside_published import NEAR, selections
from preln.report.paper.results import COMPARISON, Results, interval, text
from preln.report.summary import outcomes
from preln.report.tables import booktabs

RECIPE = "partial-3"  # which heals every criterion of the published comparison
SHARES = (0.25, 0.5)
Row = dict[str, Any]


def published_numbers(results: Results) -> pd.DataFrame:
    """Published mean accuracies as a table, one row a number."""
    rows = [n for n in results.published["numbers"] if n["statistic"] == "mean_acc"]
    names = ["model", "statistic", "value", "metric", "share", "recipe", "method"]
    return pd.DataFrame(rows).reindex(columns=names)


def comparison_rows(results: Results) -> str:
    """Criteria: what is kept where published, the loss raw and healed at both shares; least in bold."""
    run = results.others[COMPARISON]
    blocks, table = run.manifest["model"]["blocks"], outcomes(run)
    kept = selections(run, published_numbers(results), healed_by=RECIPE)
    here: pd.DataFrame = kept.loc[kept["share"] == SHARES[0]]
    told = {row["selection"]: row for row in here.to_dict("records")}
    cells: dict[tuple[str, float, str], Row] = {}
    for row in table.to_dict("records"):
        for share in SHARES:
            if row["stage"] == "dense" or abs(row["removed"] / blocks - share) >= NEAR:
                continue
            if row["stage"] == "pruned" or row["recipe"] == RECIPE:
                cells[row["metric"], share, row["stage"]] = row
    places = [(share, stage) for share in SHARES for stage in ("pruned", "healed")]
    metrics = sorted({name for name, *_ in cells}, key=lambda name: cells[name, SHARES[0], "pruned"]["loss"])
    least = {
        place: min(cells[(name, *place)]["loss"] for name in metrics if (name, *place) in cells)
        for place in places
    }
    rows = []
    for name in metrics:
        row = told.get(name)
        own = [
            "--" if row is None else f"{row['kept']:.2f} [{row['kept_least']:.2f}, {row['kept_most']:.2f}]"
        ]
        for place in places:
            own += _loss(cells.get((name, *place)), least[place], place[0] == SHARES[0])
        rows.append([text(name.replace("_", " ")), *own])
    quarter, half = (rf"{share:.0%}".replace("%", r"\,\%") for share in SHARES)
    header = ["Criterion", "Published, kept", f"Raw, {quarter}", "", f"Healed, {quarter}", ""]
    header += [f"Raw, {half}", f"Healed, {half}"]
    return booktabs(rows, header, "@{}llrlrl@{\\qquad}rr@{}")


def _loss(row: Row | None, least: float, spanned: bool) -> list[str]:
    if row is None:
        return ["--", ""] if spanned else ["--"]
    loss = f"{row['loss']:.2f}"
    loss = rf"\textbf{{{loss}}}" if row["loss"] == least else loss
    return [loss, interval(row["low"], row["high"], ".2f")] if spanned else [loss]


def comparison_values(results: Results) -> Iterator[tuple[str, Any]]:
    """How far published and measured places agree at a quarter of the blocks, and on which budget."""
    run = results.others[COMPARISON]
    table = selections(run, published_numbers(results), healed_by=RECIPE)
    own = table[table["share"] == SHARES[0]]
    yield f"{COMPARISON}/agreement/criteria", len(own)
    for name in ("raw", "healed"):
        found: Any = spearmanr(own["published_place"].astype(float), own[f"{name}_place"].astype(float))
        yield f"{COMPARISON}/agreement/{name}", f"{found.statistic:.2f}".replace("-", r"\ensuremath{-}")
    statuses = [verdict["status"] for verdict in run.verdicts]
    for status in ("supported", "unsupported", "inconclusive"):
        yield f"{COMPARISON}/decided/{status}", statuses.count(status)
    decided = {v["id"] for each in (results.study, *results.others.values()) for v in each.verdicts}
    yield "studies/hypotheses", len(decided)
    heal = next(h for h in run.heals if h["recipe"] == RECIPE)
    yield f"{COMPARISON}/run-tokens", int(heal["tokens"])
    yield f"{COMPARISON}/run-steps", int(heal["steps"])
    for name in ("", "-half"):
        share = SHARES[1] if name else SHARES[0]
        dropped = {
            len(p["drop"])
            for p in run.prunes
            if abs(len(p["drop"]) / run.manifest["model"]["blocks"] - share) < NEAR
        }
        yield f"{COMPARISON}/dropped{name}", dropped.pop()
    for evaluation in run.evaluations:
        key = str(evaluation["id"]).removeprefix("evaluate-").replace("_", "-")
        if evaluation.get("mean_acc") is not None:
            yield f"{COMPARISON}/accuracy/{key}", f"{evaluation['mean_acc']:.2f}"
