"""Figures and tables of the write-up: each is a function of the committed results alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from preln.report.depth_figures import depth_profile, norm_sigma
from preln.report.healing_figures import healing_curves
from preln.report.jacobian_figures import jacobian_bounds
from preln.report.paper_results import Results, rate, text
from preln.report.pruning_figures import damage_table
from preln.report.selection import selection_damage
from preln.report.style import INK, PALETTE, house_style, need, new_figure
from preln.report.summary import outcomes, tasks
from preln.report.tables import booktabs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def _held(table: pd.DataFrame | None) -> pd.DataFrame:
    assert table is not None  # the committed study holds every table
    return table


def damage_ranks(table: pd.DataFrame, *, width: str = "single") -> Figure:
    """Blocks by the rank of what is predicted and of what is measured: points cannot pile up.

    Args:
        table: layer, score, delta; see :func:`preln.report.pruning_figures.damage_table`.
        width: "single" or "double" column.

    Raises:
        InputError: The table is empty.
    """
    need(len(table), "block with a score and a measured damage")
    ranks = table[["score", "delta"]].rank(method="first")
    with house_style():
        figure, axes = new_figure(width, 2.9)
        axis = axes.flat[0]
        last = len(table) + 1
        axis.plot([0, last], [0, last], color=INK, linewidth=0.7, linestyle=":")
        for layer, x, y in zip(table["layer"], ranks["score"], ranks["delta"], strict=True):
            axis.text(x, y, str(layer), ha="center", va="center", fontsize=7, color=PALETTE["blue"])
        axis.set(xlim=(0, last), ylim=(0, last))
        axis.set_xlabel("rank by first-order damage")
        axis.set_ylabel("rank by measured rise of the loss")
        return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "depth-profile": lambda r: depth_profile(r.layers, width="double"),
    "norm-sigma": lambda r: norm_sigma(r.layers, width="single"),
    "jacobian-bounds": lambda r: jacobian_bounds(r.layers, width="double"),
    "damage-ranks": lambda r: damage_ranks(damage_table(_held(r.study.scores), _held(r.study.damage))),
    "selection-damage": lambda r: selection_damage(r.damage, width="double"),
    "healing-curves": lambda r: healing_curves(_held(r.study.training), width="single"),
}


def _interval(low: float, high: float, style: str) -> str:
    return f"[{low:{style}}, {high:{style}}]".replace("-", r"$-$")


# how the ledger's plain words are set
_PHRASES = {
    "|dL/dx_l|": r"$|\partial L/\partial x_l|$",
    "|dL/dtheta_l|": r"$|\partial L/\partial\theta_l|$",
    "with l, l = 0 … L": r"with $l=0,\dots,L$",
    "with l,": "with $l$,",
    "sigma^2 <= 1": r"$\sigma^2\leq1$",
    "sigma(G)": r"$\sigma(G)$",
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
    """Hypotheses: what decides, value with interval, rule, verdict."""
    rows = []
    for v in results.study.verdicts:
        value = "--" if v["value"] is None else f"{v['value']:.3g}".replace("-", r"$-$")
        low, high = v.get("interval") or (math.nan, math.nan)
        interval = "--" if math.isnan(low) else _interval(low, high, ".3g")
        rule = text(v["expected"]).replace("-", r"$-$")
        rows.append(
            [rf"\texttt{{{text(v['id'])}}}", _phrased(v["meaning"]), value, interval, rule, text(v["status"])]
        )
    header = ["Hypothesis", "Statistic", "Value", "Interval", "Holds if", "Verdict"]
    return booktabs(rows, header, r"@{}l>{\raggedright}p{0.3\linewidth}rrll@{}")


def outcome_rows(results: Results) -> str:
    """Losses before and after healing, with what was removed and trained; the lowest in bold."""
    table = outcomes(results.study)
    best = {stage: group["loss"].min() for stage, group in table.groupby("stage") if stage != "dense"}
    rows = []
    for row in table.to_dict("records"):
        healed, dense = row["stage"] == "healed", row["stage"] == "dense"
        loss = f"{row['loss']:.2f}"
        if row["loss"] == best.get(row["stage"]):
            loss = rf"\textbf{{{loss}}}"
        recipe = str(row["recipe"]).removesuffix("-published-rate") if healed else "--"
        rows.append(
            [
                *(
                    text(row["metric"] or "nothing").replace(r"\_", " "),
                    text(row["blocks"]) or "--",
                    text(recipe),
                ),
                rate(row["learning_rate"]) if healed else "--",
                loss,
                "--" if dense else _interval(row["low"], row["high"], ".2f"),
                f"{row['trainable_parameters'] / 1e6:.2f}" if healed else "--",
                f"{row['seconds']:.0f}" if healed else "--",
            ]
        )
    header = ["Criterion", "Blocks removed", "Recipe", "Rate", "Loss", "Interval", "Trained, M", "Time, s"]
    return booktabs(rows, header, "@{}lllrrlrr@{}")


def task_rows(results: Results) -> str:
    """Accuracy with its standard error, a row a model."""
    table = tasks(results.study)
    names = sorted(set(table["task"]))
    cells = table.set_index(["model", "task"])
    rows = []
    for model in dict.fromkeys(table["model"]):
        shown = [cells.loc[(model, name)] for name in names]
        words = str(model).removeprefix("heal-").removeprefix("prune-").replace("_", " ")
        rows.append([text(words), *(rf"{c['acc']:.2f} $\pm$ {c['acc_stderr']:.2f}" for c in shown)])
    return booktabs(
        rows, ["Model", *(text(n.replace("_", " ")) for n in names)], "@{}l" + "r" * len(names) + "@{}"
    )


_COLUMNS = (
    "dense",
    "reverse",
    "taylor",
    "perplexity",
    "block_influence",
    "magnitude_l1",
    "magnitude_l2",
    "random",
)


def published_rows(results: Results) -> str:
    """Published mean accuracies without a quarter of the blocks, after LoRA; the best in bold."""
    rows: dict[str, dict[str, float]] = {}
    for n in results.published["numbers"]:
        if n["statistic"] != "mean_acc" or n.get("method"):
            continue
        if n.get("share") == 0 or (n.get("share") == 0.25 and n.get("recipe") == "reassess-lora"):
            rows.setdefault(str(n["model"]).split("/")[-1], {})[n.get("metric") or "dense"] = n["value"]
    body = []
    for model, cells in rows.items():
        top = max(value for name, value in cells.items() if name != "dense")
        body.append([text(model), *(_cell(cells.get(name), top) for name in _COLUMNS)])
    header = ["Model", *(text(name.replace("_", " ").replace("block influence", "BI")) for name in _COLUMNS)]
    return booktabs(
        body, [h.replace("magnitude", "mag.") for h in header], "@{}l" + "r" * len(_COLUMNS) + "@{}"
    )


def _cell(value: float | None, top: float) -> str:
    if value is None:
        return "--"
    return rf"\textbf{{{value:.4f}}}" if value == top else f"{value:.4f}"


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
    study, probe, scores = results.study.manifest, results.probe, results.scores
    rows = []
    for name, manifest, shape in (
        ("quickstart", study, study["data"]["evaluation"]["shape"]),
        ("smollm2-probe", probe, [probe["tokens"]["sequences"], probe["tokens"]["real"]]),
        ("smollm2-scores", scores, scores["held_out"]["shape"]),
    ):
        tokens = shape[1] if name == "smollm2-probe" else shape[0] * shape[1]
        commit = str(manifest["git"]["commit"])[:12]
        cells = [f"{shape[0]}", f"{tokens:,}", text(manifest["dtype"]), text(manifest.get("device", "cpu"))]
        rows.append([rf"\texttt{{{name}}}", *cells, rf"\texttt{{{commit}}}"])
    header = ["Results", "Sequences", "Tokens", "Precision", "Device", "Commit"]
    return booktabs(rows, header, "@{}lrrlll@{}")


TABLES: dict[str, Callable[[Results], str]] = {
    "verdicts": verdict_rows,
    "outcomes": outcome_rows,
    "tasks": task_rows,
    "published": published_rows,
    "agreement": agreement_rows,
    "provenance": provenance_rows,
}
