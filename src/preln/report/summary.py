"""Tables derived from a run: outcomes, tasks, verdicts, agreement of scores with damage."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from preln.report.load import Run

OUTCOME_COLUMNS = [
    *("stage", "metric", "removed", "blocks", "recipe", "learning_rate", "loss", "low", "high"),
    *("perplexity", "dense_loss", "trainable_parameters", "tokens", "seconds"),
]
TASK_COLUMNS = ["model", "task", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"]
VERDICT_COLUMNS = [
    *(
        "id",
        "model",
        "status",
        "statement",
        "statistic",
        "value",
        "low",
        "high",
        "threshold",
        "expected",
        "n",
        "note",
    ),
]


def outcomes(run: Run) -> pd.DataFrame:
    """Loss of the dense model, of each pruned one and of each healed one, one row each.

    Rows are ordered dense first, then by the number of blocks removed and the loss before healing, each
    pruned model followed by its healed ones.

    Returns:
        Columns `OUTCOME_COLUMNS`; `stage` is dense, pruned or healed; `blocks` is text such as "3, 20–27";
        losses in nats a token, `perplexity` = exp(loss), `seconds` of healing.
    """
    rows: list[dict[str, Any]] = []
    before: dict[tuple[int, str], float] = {}
    for prune in run.prunes:
        drop = prune["drop"]
        before[len(drop), str(prune["metric"])] = numeric(prune["loss"])
        rows.append(
            {
                **{
                    "stage": "pruned",
                    "metric": str(prune["metric"]),
                    "removed": len(drop),
                    "blocks": ranges(drop),
                },
                **{key: numeric(prune.get(key)) for key in ("loss", "low", "high", "dense_loss", "tokens")},
            }
        )
    for heal in run.heals:
        drop, loss = heal["drop"], numeric(heal["loss_after"])
        before.setdefault((len(drop), str(heal["metric"])), numeric(heal.get("loss_before")))
        rows.append(
            {
                **{
                    "stage": "healed",
                    "metric": str(heal["metric"]),
                    "removed": len(drop),
                    "blocks": ranges(drop),
                },
                **{"recipe": str(heal["recipe"]), "loss": loss},
                **{
                    key: numeric(heal.get(key))
                    for key in ("learning_rate", "low", "high", "trainable_parameters", "tokens", "seconds")
                },
            }
        )

    def position(row: dict[str, Any]) -> tuple[Any, ...]:
        raw = before[row["removed"], row["metric"]]
        return (
            row["removed"],
            math.inf if math.isnan(raw) else raw,
            row["metric"],
            row["stage"] == "healed",
            row.get("recipe", ""),
            row.get("learning_rate", 0.0),
        )

    rows.sort(key=position)
    dense = dense_loss(run)
    if dense is not None:
        rows.insert(0, {"stage": "dense", "removed": 0, "blocks": "", "loss": dense, "dense_loss": dense})
    table = pd.DataFrame(rows, columns=OUTCOME_COLUMNS)
    for column in ("metric", "recipe", "blocks"):
        table[column] = table[column].astype(object).where(table[column].notna(), "")
    table["dense_loss"] = table["dense_loss"].astype(float)
    if dense is not None:
        table["dense_loss"] = table["dense_loss"].fillna(dense)
    table["perplexity"] = [_exp(loss) for loss in table["loss"]]
    return table


def dense_loss(run: Run) -> float | None:
    """Loss of the model before pruning, as the first prune step measured it; None if no step says."""
    values = [numeric(prune.get("dense_loss")) for prune in run.prunes]
    if not values and run.damage is not None and len(run.damage):
        values = [float((run.damage["loss"] - run.damage["delta"]).iloc[0])]
    values = [value for value in values if math.isfinite(value)]
    return values[0] if values else None


def tasks(run: Run) -> pd.DataFrame:
    """Accuracy on each task with its standard error, one row a model and task; columns `TASK_COLUMNS`.

    Where none was stored, it is that of a share, ``sqrt(acc (1 - acc) / (n - 1))``.
    """
    rows = []
    for evaluation in run.evaluations:
        model = str(evaluation.get("model", evaluation["id"]))
        for task, numbers in sorted(evaluation["tasks"].items()):
            row = {key: numeric(numbers.get(key)) for key in TASK_COLUMNS[2:]}
            for name in ("acc", "acc_norm"):  # lm-eval has none for groups of which few documents were sat
                if math.isnan(row[f"{name}_stderr"]) and row["n"] > 1:
                    row[f"{name}_stderr"] = math.sqrt(row[name] * (1.0 - row[name]) / (row["n"] - 1.0))
            rows.append({"model": model, "task": str(task), **row})
    return pd.DataFrame(rows, columns=TASK_COLUMNS)


def verdict_table(run: Run) -> pd.DataFrame:
    """The verdicts with their interval in two columns; columns `VERDICT_COLUMNS`."""
    rows = []
    for verdict in run.verdicts:
        low, high = interval(verdict)
        row = {key: verdict.get(key) for key in VERDICT_COLUMNS}
        row |= {"low": low, "high": high}
        row |= {key: numeric(verdict.get(key)) for key in ("value", "threshold", "n")}
        rows.append(row)
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


def hypothesis_name(verdict: dict[str, Any]) -> str:
    """The hypothesis, and the pruned model that decided it where the study named one.

    >>> hypothesis_name({"id": "HYP-QLORA", "model": "reverse-8"})
    'HYP-QLORA on reverse-8'
    """
    model = verdict.get("model")
    return f"{verdict['id']} on {model}" if isinstance(model, str) and model else str(verdict["id"])


def interval(record: dict[str, Any]) -> tuple[float, float]:
    """The `interval` of a verdict as two numbers, NaN where there is none."""
    pair = record.get("interval")
    if isinstance(pair, list | tuple) and len(pair) == 2:
        return numeric(pair[0]), numeric(pair[1])
    return math.nan, math.nan


def agreement(scores: pd.DataFrame, damage: pd.DataFrame) -> pd.DataFrame:
    """Spearman rank correlation of each metric's scores with the damage of removing each block alone.

    Returns:
        Columns metric, rank_correlation, n (blocks that both tables hold), the best first.
    """
    rows = []
    for metric, group in scores.groupby("metric", sort=True):
        joined = group[["layer", "score"]].merge(damage[["layer", "delta"]], on="layer").dropna()
        rows.append(
            {
                "metric": metric,
                "rank_correlation": spearman(joined.loc[:, "score"], joined.loc[:, "delta"]),
                "n": len(joined),
            }
        )
    table = pd.DataFrame(rows, columns=["metric", "rank_correlation", "n"])
    return table.sort_values(["rank_correlation", "metric"], ascending=[False, True], ignore_index=True)


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN if either side is constant."""
    ranks_a, ranks_b = a.rank(), b.rank()
    if len(a) < 2 or ranks_a.nunique() < 2 or ranks_b.nunique() < 2:
        return math.nan
    return float(ranks_a.corr(ranks_b))


def ranges(blocks: list[int]) -> str:
    """Block numbers in order with runs joined: [3, 20, 21, 22] -> "3, 20–22".

    >>> ranges([22, 20, 21, 3])
    '3, 20–22'
    """
    parts: list[list[int]] = []
    for block in sorted(int(block) for block in blocks):
        if parts and block == parts[-1][-1] + 1:
            parts[-1].append(block)
        else:
            parts.append([block])
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def numeric(value: Any) -> float:
    """A stored number as a float; NaN for what is none, True and False included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
