"""Each model against the unpruned one, on the same documents: the difference itself, not two averages."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from preln.base.errors import InputError
from preln.report.load import Run
from preln.report.tables import booktabs, latex_escape, number

DENSE = "dense"
COLUMNS = [
    *("model", "task", "n", "first", "second", "difference", "low", "high"),
    *("first_only", "second_only", "p", "p_holm"),
]


def paired_differences(run: Run) -> pd.DataFrame:
    """Every evaluated model against the unpruned one, task by task and over the mean of tasks.

    Intervals are percentile bootstraps over documents, p-values McNemar's exact test with Holm's correction
    over the models of a task: see :func:`preln.evaluate.compare_several`, which does the work.

    Returns:
        Columns `COLUMNS`; ``first`` is the unpruned model's accuracy, ``second`` the other's, ``difference``
        second minus first.

    Raises:
        InputError: the run stores no outcome of single documents, none of the unpruned model, or the models
            did not sit the same documents.
    """
    names = {str(found["id"]): str(found.get("model", found["id"])) for found in run.evaluations}
    stored = {names[step]: table for step, table in run.documents.items() if step in names}
    if not stored:
        raise InputError("no outcomes of single documents are stored: run the evaluation again to store them")
    if DENSE not in stored:
        raise InputError("the unpruned model's documents are not stored: evaluate `dense` in the study too")
    others = {name: table for name, table in stored.items() if name != DENSE}
    if not others:
        raise InputError("only the unpruned model was evaluated: there is nothing to compare it with")
    from preln.evaluate.paired import compare_several, groups_of

    whole = next(found for found in run.evaluations if names[str(found["id"])] == DENSE)
    groups = groups_of(whole, stored[DENSE]["task"])
    return compare_several(stored[DENSE], others, groups=groups).loc[:, COLUMNS]


def paired_table(run: Run) -> pd.DataFrame:
    """As :func:`paired_differences`, without rows where the run does not hold what that needs."""
    try:
        return paired_differences(run)
    except InputError:
        return pd.DataFrame(columns=COLUMNS)


def paired_view(run: Run) -> dict[str, Any] | None:
    """The differences as text for the page, or why there are none; None where nothing was evaluated."""
    if not run.evaluations:
        return None
    try:
        table = paired_differences(run)
    except InputError as error:
        return {"why": str(error), "rows": []}
    return {"why": "", "rows": [_row(row) for row in table.to_dict("records")]}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["low"], row["high"]
    unsure = math.isnan(low) or math.isnan(high)
    return {
        **{key: str(row[key]) for key in ("model", "task")},
        **{key: number(int(row[key])) for key in ("n", "first_only", "second_only")},
        **{key: f"{row[key]:.3f}" for key in ("first", "second")},
        **{key: _p(row[key]) for key in ("p", "p_holm")},
        "difference": signed(row["difference"]),
        "interval": "–" if unsure else f"{signed(low)} to {signed(high)}",
        "beyond_zero": not unsure and (low > 0 or high < 0),
    }


def paired_latex(table: pd.DataFrame) -> str:
    r"""Paired differences with their interval; those whose interval excludes 0 in bold."""
    rows = []
    for row in table.to_dict("records"):
        told = _row(row)
        difference = told["difference"].replace("−", "$-$")
        cells = [told["model"], told["task"], told["n"], told["first"], told["second"]]
        rows.append(
            [
                *(latex_escape(cell) for cell in cells),
                rf"\textbf{{{difference}}}" if told["beyond_zero"] else difference,
                latex_escape(told["interval"]),
                f"{told['first_only']}/{told['second_only']}",
                latex_escape(told["p_holm"]),
            ]
        )
    header = ["Model", "Task", "$n$", "Dense", "Accuracy", "Difference", "Interval", "Only one", "$p$"]
    return booktabs(rows, header, "llrrrrrrr")


def signed(value: float) -> str:
    """A difference of shares with its sign.

    >>> signed(-0.0625), signed(0.0), signed(float("nan"))
    ('−0.062', '0.000', '–')
    """
    if math.isnan(value):
        return "–"
    return ("0.000" if abs(value) < 0.0005 else f"{value:+.3f}").replace("-", "−")


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
