"""CSV and LaTeX (booktabs) tables of a run.

The LaTeX is a bare `tabular`, to be put into a float of the writer's own; it needs only the package booktabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from preln.report.load import Run
from preln.report.summary import hypothesis_name, outcomes, tasks, verdict_table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "—": "---",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "∂": r"$\partial$",
    "∑": r"$\sum$",
    "Σ": r"$\Sigma$",
    "∏": r"$\prod$",
    "√": r"$\surd$",
    "→": r"$\to$",
    "∈": r"$\in$",
    "‖": r"$\Vert$",
    "²": r"$^2$",
    "₂": r"$_2$",
    "ℝ": r"$\mathrm{R}$",
    "…": r"\ldots{}",
} | {
    letter: rf"$\{name}$"
    for letter, name in zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΦΨΩ",
        [
            *(
                "alpha",
                "beta",
                "gamma",
                "delta",
                "epsilon",
                "zeta",
                "eta",
                "theta",
                "iota",
                "kappa",
                "lambda",
            ),
            *("mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
            *("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Phi", "Psi", "Omega"),
        ],
        strict=True,
    )
}


def latex_escape(text: str) -> str:
    r"""Text with every character that LaTeX would read as a command made harmless, and mathematics signs set.

    >>> latex_escape("50 % of σ_max")
    '50 \\% of $\\sigma$\\_max'
    """
    # A line break or control character from data must not end the table's row.
    return "".join(_LATEX.get(c, c) for c in " ".join(str(text).split()))


def number(value: Any, digits: int = 4) -> str:
    """A number to read: significant digits, no needless exponent, an en dash where there is none.

    >>> number(1234567), number(0.123456), number(float("nan")), number(1.5e-7)
    ('1,234,567', '0.1235', '–', '1.5e-7')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.{digits}g}".replace("e-0", "e-")


def booktabs(rows: Sequence[Sequence[str]], header: Sequence[str], align: str) -> str:
    """A booktabs `tabular`; the cells must be LaTeX already."""
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", " & ".join(header) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def csv(frame: pd.DataFrame) -> str:
    """The table as CSV with every digit, one newline a row."""
    return frame.to_csv(index=False, lineterminator="\n")


def verdicts_latex(table: pd.DataFrame) -> str:
    """Verdicts: ID, statistic, value with interval, threshold, n, status."""
    rows = [
        [
            latex_escape(hypothesis_name(row)),
            latex_escape(row["statistic"] or ""),
            _with_interval(row["value"], row["low"], row["high"]),
            latex_escape(number(row["threshold"])),
            latex_escape(number(row["n"])),
            latex_escape(row["status"]),
        ]
        for row in table.to_dict("records")
    ]
    header = ["Hypothesis", "Statistic", "Value [95\\,\\% interval]", "Threshold", "$n$", "Verdict"]
    return booktabs(rows, header, r"lp{0.3\linewidth}rrrl")


def outcomes_latex(table: pd.DataFrame) -> str:
    """Outcomes: metric, blocks removed, recipe, loss with interval, perplexity, parameters trained, seconds.

    The lowest loss among the healed models is in bold, and so is the lowest among the pruned ones.
    """
    best = {stage: group["loss"].min() for stage, group in table.groupby("stage") if stage != "dense"}
    rows = []
    for row in table.to_dict("records"):
        loss = _with_interval(row["loss"], row["low"], row["high"])
        if row["loss"] == best.get(row["stage"]):
            loss = rf"\textbf{{{loss}}}"
        rows.append(
            [
                latex_escape(row["metric"] or "dense"),
                latex_escape(number(row["removed"])),
                latex_escape(row["recipe"] or ("none" if row["stage"] == "pruned" else "–")),
                loss,
                latex_escape(number(row["perplexity"])),
                latex_escape(number(row["trainable_parameters"])),
                latex_escape(number(row["seconds"], 3)),
            ]
        )
    header = ["Metric", "Removed", "Recipe", "Loss", "Perplexity", "Trained", "Seconds"]
    return booktabs(rows, header, "lrlrrrr")


def tasks_latex(table: pd.DataFrame) -> str:
    r"""Tasks: a row a model, a column a task, accuracy $\pm$ standard error, the best of a column in bold."""
    names = sorted(table["task"].unique())
    best: Any = table.groupby("task")["acc"].max()  # a Series, typed as a scalar too
    rows = []
    for model, group in table.groupby("model", sort=False):
        cells = group.set_index("task")
        row = [latex_escape(str(model))]
        for name in names:
            if name not in cells.index or math.isnan(cells.loc[name, "acc"]):
                row.append("--")
                continue
            acc, error = cells.loc[name, "acc"], cells.loc[name, "acc_stderr"]
            text = f"{acc:.3f}"
            if acc == best[name]:
                text = rf"\textbf{{{text}}}"
            row.append(text if math.isnan(error) else rf"{text} $\pm$ {error:.3f}")
        rows.append(row)
    return booktabs(rows, ["Model", *(latex_escape(name) for name in names)], "l" + "r" * len(names))


def run_tables(run: Run) -> dict[str, str]:
    """Every table of a run: file name (as `verdicts.tex`) to content; a table without rows is left out."""
    makers: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], str]]] = {
        "verdicts": (verdict_table(run), verdicts_latex),
        "outcomes": (outcomes(run), outcomes_latex),
        "tasks": (tasks(run), tasks_latex),
    }
    files = {}
    for name, (table, latex) in makers.items():
        if len(table):
            files[f"{name}.csv"] = csv(table)
            files[f"{name}.tex"] = latex(table)
    return files


def _with_interval(value: float, low: float, high: float) -> str:
    text = number(value)
    if not (math.isnan(low) or math.isnan(high)):
        text += f" [{number(low)}, {number(high)}]"
    return latex_escape(text)
