"""Text for tables: numbers to read, LaTeX that data cannot break, booktabs, CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

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
