"""What the write-up draws on, read from committed results, and how its numbers are set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.report.load import Run, load_run
from preln.report.tables import latex_escape

STUDY, PROBE, SCORES = "quickstart", "smollm2-probe", "smollm2-scores"
PLACEMENT, REASONING, HEALING = "norm-placement", "reasoning", "healing-smollm2-135m"
WINDOWS, COMPARISON = "uidl-smollm2-135m", "reassessing-smollm2-135m"
# studies beside the first, in the order of the tables, and what the tables call them
LABELS = {
    COMPARISON: "comparison",  # the main one
    HEALING: "healing",
    WINDOWS: "windows",
    PLACEMENT: "placement",
    REASONING: "reasoning",
}
OTHERS = tuple(LABELS)


@dataclass(frozen=True)
class Results:
    """The committed results that the write-up draws on."""

    study: Run
    layers: pd.DataFrame
    probe: dict[str, Any]
    damage: pd.DataFrame
    correlations: pd.DataFrame
    scores: dict[str, Any]
    published: dict[str, Any]
    others: dict[str, Run]


def read_results(folder: str | Path, published: str | Path) -> Results:
    """Read what the write-up draws on.

    Args:
        folder: The committed results, a folder a run.
        published: The file of published numbers.

    Raises:
        InputError: A folder or file is missing or damaged; the line names it.
    """
    root, table = Path(folder), Path(published)
    for name in (STUDY, PROBE, SCORES, *OTHERS):
        if not (root / name / "manifest.json").is_file():
            raise InputError(f"{root / name}: missing, and the paper needs it: restore it or run it again")
    frames = {}
    for place in (f"{PROBE}/layers", f"{SCORES}/damage", f"{SCORES}/correlations"):
        path = root / f"{place}.parquet"
        if not path.is_file():
            raise InputError(f"{path}: missing, and the paper needs it: restore it or run it again")
        frames[place] = pd.read_parquet(path)
    if not table.is_file():
        raise InputError(f"{table}: missing, and the paper needs it: restore it")
    return Results(
        load_run(root / STUDY),
        frames[f"{PROBE}/layers"],
        read_json(root / PROBE / "manifest.json"),
        frames[f"{SCORES}/damage"],
        frames[f"{SCORES}/correlations"],
        read_json(root / SCORES / "manifest.json"),
        yaml.safe_load(table.read_text(encoding="utf-8")),
        {name: load_run(root / name) for name in OTHERS},
    )


def tex(value: float, digits: int = 3) -> str:
    r"""A number as LaTeX, in text and in mathematics: significant digits, powers of ten where they run long.

    >>> tex(10240), tex(-0.99758), tex(7.98e96), tex(0.03)
    ('10{,}240', '\\ensuremath{-}0.998', '\\ensuremath{7.98\\times10^{96}}', '0.0300')
    """
    if isinstance(value, int) or (float(value).is_integer() and 1000 <= abs(value) < 1e7):
        text = f"{int(value):,}".replace(",", "{,}")
    elif 1000 <= abs(value) < 1e4:
        text = f"{value:,.0f}".replace(",", "{,}")
    elif value == 0 or 1e-3 <= abs(value) < 1000:
        places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:.{max(places, 0)}f}"
    else:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return rf"\ensuremath{{{mantissa}\times10^{{{int(power)}}}}}"
    return text.replace("-", r"\ensuremath{-}")


def rate(value: float) -> str:
    r"""A learning rate as a power of ten.

    >>> rate(1e-5), rate(5e-4)
    ('\\ensuremath{10^{-5}}', '\\ensuremath{5\\times10^{-4}}')
    """
    mantissa, power = f"{value:.0e}".split("e")
    factor = "" if mantissa == "1" else rf"{mantissa}\times"
    return rf"\ensuremath{{{factor}10^{{{int(power)}}}}}"


def interval(low: float, high: float, style: str) -> str:
    """Both ends in brackets, as LaTeX."""
    return f"[{low:{style}}, {high:{style}}]".replace("-", r"$-$")


def text(value: Any) -> str:
    """Words from data as LaTeX."""
    return latex_escape(str(value))
