"""The chart of mutants: which false variants of each theorem's steps the checks reject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.base.errors import InputError
from preln.report.load import Run
from preln.report.style import INK, PALETTE, PAPER, house_style, new_figure, settle
from preln.theory.mutation import MUTATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NONE = "none"
FAMILIES = {"LN": "RMS", "SPD": "PRN"}
"""Claims whose IDs begin differently, though they belong together and alternate in the ledger."""


def details(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """A claim's evidence, as far as it has a table for its detail."""
    found = [item for item in claim.get("evidence") or [] if isinstance(item, dict)]
    return [item for item in found if isinstance(item.get("detail"), dict)]


def mutant_table(run: Run) -> pd.DataFrame | None:
    """Mutants by theorem and mutation: claim, mutation, killed, total, survivors (their names).

    A theorem without mutants has one row with the mutation `NONE` and 0 of 0.
    """
    rows = []
    for claim in run.claims:
        if claim.get("kind", "theorem") != "theorem":
            continue
        controls = [c for item in details(claim) for c in item["detail"].get("negative_controls") or []]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for control in controls:
            by_kind.setdefault(str(control.get("mutation") or "other"), []).append(control)
        for kind, members in by_kind.items() or [(NONE, [])]:
            alive = [str(c.get("name")) for c in members if c.get("rejected") is not True]
            rows.append(
                (str(claim["id"]), kind, len(members) - len(alive), len(members), "; ".join(sorted(alive)))
            )
    table = pd.DataFrame(rows, columns=["claim", "mutation", "killed", "total", "survivors"])
    return table if _count(table, "total") else None


def _count(table: pd.DataFrame, column: str) -> int:
    return int(table[column].to_numpy().sum())


def columns(table: pd.DataFrame) -> list[str]:
    """The mutations that occur, in order: those of `MUTATIONS`, then others by name."""
    present = set(table["mutation"]) - {NONE}
    return [m for m in MUTATIONS if m in present] + sorted(present - set(MUTATIONS))


def mutant_chart(table: pd.DataFrame | None, *, width: str = "single") -> Figure:
    """Theorems down the side, mutations across; a number is how many were rejected, red where not all were.

    Args:
        table: as from `mutant_table`.
        width: "single" or "double" column.

    Raises:
        InputError: there are no mutants.
    """
    if table is None or not _count(table, "total"):
        raise InputError("nothing to draw: the table holds no mutants")
    claims = [str(claim) for claim in dict.fromkeys(table["claim"])]
    kinds = columns(table)
    # side by side where there is room, so that a long ledger fits a page
    sides = 1 if width == "single" or len(claims) < 20 else 2
    length = -(-len(claims) // sides)
    with house_style():
        figure, axes = new_figure(width, 0.125 * length + 1.35, ncols=sides)
        for side, axis in enumerate(axes.flat):
            _grid(axis, table, claims[side * length : (side + 1) * length], kinds, length)
        killed, total = _count(table, "killed"), _count(table, "total")
        axes[0, 0].set_title(f"{killed} of {total} mutants rejected", loc="left", pad=4)
        # labels as small as these come out wider at the resolution of the files than at that of the layout
        figure.set_layout_engine("constrained", w_pad=0.1)
        settle(figure)
        return figure


def _grid(axis: Axes, table: pd.DataFrame, claims: list[str], kinds: list[str], length: int) -> None:
    """Draw some claims' rows, with the sum of each at its end."""
    sums: dict[str, list[int]] = {claim: [0, 0] for claim in claims}
    for record in table.to_dict("records"):
        claim, kind = str(record["claim"]), str(record["mutation"])
        if claim not in sums:
            continue
        row = claims.index(claim)
        if kind == NONE:
            _text(axis, len(kinds), row, NONE, PALETTE["vermillion"], bold=True)
            continue
        killed, total = int(record["killed"]), int(record["total"])
        sums[claim] = [sums[claim][0] + killed, sums[claim][1] + total]
        _cell(axis, kinds.index(kind), row, killed, total)
    for row, (killed, total) in enumerate(sums.values()):
        if total:
            _cell(axis, len(kinds), row, killed, total, plain=True)
    _frame(axis, claims, [*kinds, "all"], length)


def _cell(axis: Axes, column: int, row: int, killed: int, total: int, *, plain: bool = False) -> None:
    """Draw one cell: a count on pale blue, or killed/total on vermillion."""
    from matplotlib.patches import Rectangle

    survived = killed < total
    if survived or not plain:
        colour = PALETTE["vermillion"] if survived else PALETTE["sky"]
        # pale by transparency, so that it stays pale on a dark page
        shade = 1.0 if survived else 0.35
        box = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, facecolor=colour, alpha=shade, linewidth=0)
        axis.add_patch(box)
    text = f"{killed}/{total}" if survived else str(total)
    _text(axis, column, row, text, PAPER if survived else INK, bold=survived)


def _text(axis: Axes, column: int, row: int, text: str, colour: str, *, bold: bool) -> None:
    size = 5.4 if len(text) < 4 else 4.4 if len(text) < 5 else 4.1
    weight = "bold" if bold and len(text) < 5 else "normal"
    axis.text(
        column, row, text, color=colour, fontsize=size, weight=weight, ha="center", va="center_baseline"
    )


def _frame(axis: Axes, claims: list[str], kinds: list[str], length: int) -> None:
    """Name rows and columns; a thin rule where the family of claims changes."""
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    axis.set_ylim(length - 0.5, -0.5)
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(kinds)), kinds, rotation=50, ha="left", rotation_mode="anchor", fontsize=6)
    axis.set_yticks(range(len(claims)), claims, fontsize=5.4)
    axis.tick_params(length=0, pad=2)
    axis.spines[:].set_visible(False)
    families = [FAMILIES.get(name, name) for name in (claim.split("-")[0] for claim in claims)]
    for row in range(1, len(claims)):
        if families[row] != families[row - 1]:
            axis.axhline(row - 0.5, color=INK, linewidth=0.4)
    axis.plot([len(kinds) - 1.5] * 2, [-0.5, len(claims) - 0.5], color=INK, linewidth=0.4)


def describe_mutants(table: pd.DataFrame) -> str:
    """How many were rejected, and every survivor by name."""
    killed, total = _count(table, "killed"), _count(table, "total")
    claims = len(set(table.loc[table["total"] > 0, "claim"]))
    records = table.to_dict("records")
    alive = [r for r in records if r["killed"] < r["total"]]
    parts = [f"{r['claim']}, {r['mutation']}: {r['survivors']}" for r in alive]
    bare = [str(r["claim"]) for r in records if r["mutation"] == NONE]
    text = f"{killed} of {total} mutants of {claims} theorems were rejected"
    text += f"; survivors: {'; '.join(parts)}" if parts else "; none survived"
    return text + (f"; without mutants: {', '.join(bare)}." if bare else ".")
