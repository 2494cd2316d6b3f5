"""Tables of the write-up: each is a function of the committed results alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from preln.report.findings import SHOWN
from preln.report.healing_study import healing_runs, recipe_means
from preln.report.paper.comparison import comparison_rows
from preln.report.paper.results import (
    COMPARISON,
    HEALING,
    LABELS,
    PROBE,
    SCORES,
    Results,
    interval,
    rate,
    text,
)
from preln.report.tables import booktabs

# how the ledger's plain words are set
_PHRASES = {
    "|dL/dx_l|": r"$|\partial L/\partial x_l|$",
    "|dL/dtheta_l|": r"$|\partial L/\partial\theta_l|$",
    "with l, l = 0 … L": r"with $l=0,\dots,L$",
    "with l,": "with $l$,",
    "sigma^2 <= 1": r"$\sigma^2\leq1$",
    "sigma^2 > 1": r"$\sigma^2>1$",
    "sigma of the norm's Jacobian < 1": r"$\sigma$ of the norm's Jacobian is below one",
    "sigma(G)": r"$\sigma(G)$",
    "sigma(J - I)": r"$\sigma(J-I)$",
    "head < +1 < +2 < +3": "head $<$ $+1$ $<$ $+2$ $<$ $+3$",
    "1e-5": "$10^{-5}$",
}


def _phrased(words: str) -> str:
    parts = re.split("(" + "|".join(re.escape(phrase) for phrase in _PHRASES) + ")", words)
    return "".join(_PHRASES.get(part) or _edged(part) for part in parts)


def _edged(part: str) -> str:
    """Escaped words that keep the spaces at their ends."""
    if not part.strip():
        return part
    return part[: len(part) - len(part.lstrip())] + text(part) + part[len(part.rstrip()) :]


def verdict_rows(results: Results) -> str:
    """Hypotheses of the main study: what decides, on which model, value with interval, rule, verdict."""
    rows, former = [], ""
    for v in results.others[COMPARISON].verdicts:
        value = "--" if v["value"] is None else f"{v['value']:.2f}".replace("-", r"$-$")
        low, high = v.get("interval") or (math.nan, math.nan)
        span = "--" if math.isnan(low) else interval(low, high, ".2f")
        rule = text(v["expected"]).replace("-", r"$-$").replace("below", "$<$").replace("above", "$>$")
        model = str(v.get("model") or "").rpartition("-")[0].replace("block_influence", "BI")
        named = [rf"\texttt{{{text(v['id'])}}}", _phrased(v["meaning"])] if v["id"] != former else ["", ""]
        former = v["id"]
        rows.append([*named, text(model), value, span, rule, SHOWN[v["status"]]])
    header = ["Hypothesis", "Statistic", "On", "Value", "Interval", "Holds if", "Verdict"]
    return booktabs(rows, header, r"@{}l>{\raggedright}p{0.385\linewidth}lrrll@{}")


def recipe_rows(results: Results) -> str:
    """Every recipe at the rate that validation chose, on each pruned model; the least loss in bold."""
    means = recipe_means(healing_runs(results.others[HEALING]))
    chosen = means.loc[means["best"]]
    models = list(dict.fromkeys(chosen["model"]))
    least = chosen.groupby("model")["loss"].min()
    table = chosen.set_index(["model", "recipe"])
    rows = []
    for recipe in chosen.loc[chosen["model"] == models[0]].sort_values(by="loss")["recipe"]:
        cells = [text(recipe)]
        for model in models:
            own: Any = table.loc[(model, recipe)]
            loss = f"{own['loss']:.2f}"
            loss = rf"\textbf{{{loss}}}" if own["loss"] == least[model] else loss
            cells += [rate(own["learning_rate"]), loss, interval(own["low"], own["high"], ".2f")]
        rows.append([*cells, f"{own['trainable_parameters'] / 1e6:.1f}", f"{own['seconds']:.0f}"])
    names = [text(model.replace("_", " ").rpartition("-")[0]) for model in models]
    header = [
        "Recipe",
        *(word for name in names for word in ("Rate", name, "Seeds")),
        "Trained, M",
        "Time, s",
    ]
    return booktabs(rows, header, "@{}l" + "lrl" * len(models) + "rr@{}")


def study_rows(results: Results) -> str:
    """How many verdicts of the studies beside the main one hold, do not, and are undecided, by hypothesis."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, run in results.others.items():
        if name == COMPARISON:
            continue
        for verdict in run.verdicts:
            found.setdefault(verdict["id"], []).append((LABELS[name], verdict))
    rows = []
    for hypothesis, verdicts in sorted(found.items()):
        statuses = [verdict["status"] for _, verdict in verdicts]
        counts = [str(statuses.count(kind)) for kind in ("supported", "unsupported", "inconclusive")]
        studies = ", ".join(dict.fromkeys(name for name, _ in verdicts))
        said = _phrased(verdicts[0][1]["statement"])
        rows.append([rf"\texttt{{{text(hypothesis)}}}", said, studies, *counts])
    header = ["Hypothesis", "Statement", "Studies", "Holds", "Not", "Undecided"]
    return booktabs(rows, header, r"@{}l>{\raggedright}p{0.48\linewidth}lrrr@{}")


def agreement_rows(results: Results) -> str:
    """Criteria by how they rank the blocks against the measured damage of single blocks, in two columns."""
    mine = results.correlations.query("other == 'measured_damage' and metric != 'measured_damage'")
    ordered: list[dict[str, Any]] = mine.sort_values(
        by=["spearman", "metric"], ascending=[False, True], kind="stable"
    ).to_dict("records")
    cells = [
        [text(row["metric"]).replace(r"\_", " "), f"{row['spearman']:.2f}".replace("-", r"$-$"),
         rf"{row['overlap']:.0%}".replace("%", r"\,\%")]
        for row in ordered
    ]  # fmt: skip
    half = (len(cells) + 1) // 2
    right = [*cells[half:], *([["", "", ""]] * (2 * half - len(cells)))]
    rows = [[*a, *b] for a, b in zip(cells[:half], right, strict=True)]
    return booktabs(rows, ["Criterion", "Corr.", "Shared"] * 2, "@{}lrr@{\\qquad}lrr@{}")


def provenance_rows(results: Results) -> str:
    """What each set of results came from."""
    sets: list[tuple[str, dict[str, Any], int, int]] = []
    for run in (results.study, *results.others.values()):
        shape = run.manifest["data"]["evaluation"]["shape"]
        sets.append((run.name, run.manifest, shape[0], shape[0] * shape[1]))
    probed, held = results.probe["tokens"], results.scores["held_out"]["shape"]
    sets.insert(1, (PROBE, results.probe, probed["sequences"], probed["real"]))
    sets.insert(2, (SCORES, results.scores, held[0], held[0] * held[1]))
    rows = []
    for name, manifest, sequences, tokens in sets:
        commit = str(manifest["git"]["commit"])[:12]
        cells = [str(sequences), f"{tokens:,}", text(manifest["dtype"]), text(manifest.get("device", "cpu"))]
        rows.append([rf"\texttt{{{name}}}", *cells, rf"\texttt{{{commit}}}"])
    header = ["Results", "Sequences", "Tokens", "Precision", "Device", "Commit"]
    return booktabs(rows, header, "@{}lrrlll@{}")


TABLES: dict[str, Callable[[Results], str]] = {
    "verdicts": verdict_rows,
    "studies": study_rows,
    "comparison": comparison_rows,
    "recipes": recipe_rows,
    "agreement": agreement_rows,
    "provenance": provenance_rows,
}
