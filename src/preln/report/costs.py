"""What a run cost: seconds, memory, trained parameters and operations, as its steps stored them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from preln.report.load import Run
from preln.report.summary import numeric
from preln.report.tables import booktabs, latex_escape, number

MEASURED = ["training_seconds", "peak_memory_bytes", "trainable_parameters", "tokens", "operations"]
COLUMNS = ["step", "kind", "model", "recipe", "seconds", *MEASURED]


def costs(run: Run) -> pd.DataFrame:
    """One row a finished step: what it took, NaN for what it did not store.

    Returns:
        Columns `COLUMNS`: ``seconds`` of the whole step, ``training_seconds`` of a healing step's updates
        alone, ``peak_memory_bytes``, ``trainable_parameters``, ``tokens`` trained on, ``operations``.
    """
    healed = {str(heal["id"]): heal for heal in run.heals}
    rows = []
    for step in run.steps:
        told = healed.get(step.id, {})
        row: dict[str, Any] = {"step": step.id, "kind": step.kind, "seconds": numeric(step.seconds)}
        row |= {"model": "", "recipe": ""} | {name: numeric(told.get(name)) for name in MEASURED}
        if told:
            row["model"] = f"{told['metric']}-{len(told['drop'])}"
            row["recipe"] = str(told.get("base_recipe", told["recipe"]))
            row["training_seconds"] = numeric(told.get("seconds"))
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def cost_groups(run: Run) -> pd.DataFrame:
    """Steps of a kind together, healing steps by recipe, in the order of the study.

    Returns:
        ``what`` (a kind or ``heal: RECIPE``), ``steps`` (how many), ``seconds`` (their sum),
        ``training_seconds`` and ``tokens`` (means over steps), ``peak_memory_bytes`` (the largest),
        ``fewest_parameters`` and ``most_parameters``, ``operations`` (mean).
    """
    table = costs(run)
    order = ["verify", "probe", "score", "damage", "prune", "shift", "heal", "evaluate", "decide"]
    table["what"] = [f"heal: {r}" if r else k for k, r in zip(table["kind"], table["recipe"], strict=True)]
    table["place"] = [order.index(kind) if kind in order else len(order) for kind in table["kind"]]
    rows = []
    groups: Any = table.sort_values(["place", "what"], kind="stable").groupby("what", sort=False)
    for what, own in groups:
        rows.append(
            {
                **{"what": what, "steps": len(own), "seconds": own["seconds"].sum(min_count=1)},
                **{name: own[name].mean() for name in ("training_seconds", "tokens", "operations")},
                "peak_memory_bytes": own["peak_memory_bytes"].max(),
                "fewest_parameters": own["trainable_parameters"].min(),
                "most_parameters": own["trainable_parameters"].max(),
            }
        )
    columns = ["what", "steps", "seconds", *MEASURED[:2], "fewest_parameters", "most_parameters"]
    return pd.DataFrame(rows, columns=[*columns, *MEASURED[3:]])


def cost_view(run: Run) -> dict[str, Any] | None:
    """The costs as text, summed by kind or recipe, and which of them no step stored; None without steps."""
    table = cost_groups(run)
    if not len(table):
        return None
    wanted = {"peak_memory_bytes": "peak memory", "operations": "operations"}
    missing = [words for name, words in wanted.items() if not table.loc[:, name].notna().any()]
    rows = [_texts(row) for row in table.to_dict("records")]
    seconds: Any = table["seconds"].sum()  # a number, typed as a Series too
    total = number(float(seconds), 3)
    return {"rows": rows, "missing": missing, "total": total, "operations": "operations" not in missing}


def _texts(row: dict[str, Any]) -> dict[str, str]:
    fewest, most = number(row["fewest_parameters"]), number(row["most_parameters"])
    return {
        "what": str(row["what"]),
        **{name: number(row[name], 3) for name in ("steps", "seconds", "training_seconds", "tokens")},
        "memory": gibibytes(row["peak_memory_bytes"]),
        "parameters": most if fewest == most else f"{fewest} to {most}",
        "operations": "–" if math.isnan(row["operations"]) else f"{row['operations']:.2e}",
    }


def costs_latex(table: pd.DataFrame) -> str:
    """Costs by kind or recipe; columns that no step stored are left out."""
    heads = {
        **{"what": "Step", "steps": "Steps", "seconds": "Seconds", "training_seconds": "Training s"},
        **{"memory": "Peak GiB", "parameters": "Trained", "tokens": "Tokens", "operations": "Operations"},
    }
    rows = [_texts(row) for row in table.to_dict("records")]
    shown = [name for name in heads if any(row[name] != "–" for row in rows)]
    cells = [[latex_escape(row[name].removesuffix(" GiB")) for name in shown] for row in rows]
    return booktabs(cells, [heads[name] for name in shown], "l" + "r" * (len(shown) - 1))


def gibibytes(value: float) -> str:
    """Bytes to read.

    >>> gibibytes(4922142720.0), gibibytes(float("nan"))
    ('4.58 GiB', '–')
    """
    return "–" if math.isnan(value) else f"{value / 2**30:.2f} GiB"
