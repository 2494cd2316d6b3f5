"""Criteria side by side: the figure of what following each costs, and a page's tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.prune import CRITERIA, HALF_METRICS, REPLACEMENTS, orders
from preln.prune.compare import MEASURED
from preln.prune.systems import SYSTEMS
from preln.report.markdown import cell
from preln.report.style import CYCLE, INK, MARKERS, house_style, new_figure
from preln.report.summary import ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def systems() -> str:
    """Every published system, and what asks for it here."""
    lines = ["| system | published by | what it does | in preln | remark |", "|---|---|---|---|---|"]
    for each in SYSTEMS:
        asked = ", ".join(f"`{_option(name)} {name}`" for name in each.ask)
        lines.append(f"| {each.name} | {each.source} | {cell(each.idea)} | {asked} | {cell(each.note)} |")
    return "\n".join(lines)


def _option(name: str) -> str:
    """The option of ``preln prune`` that takes a name."""
    if name in REPLACEMENTS:
        return "--method"
    criteria = name.partition("@")[0] in {*CRITERIA, *HALF_METRICS}  # some are presets' names too
    return "--metric" if criteria else "--protect"


def _by_damage(damage: pd.DataFrame) -> list[str]:
    """Criteria, the least damage at the largest size first."""
    most = damage.loc[damage["drop"] == damage["drop"].max()].sort_values(by="loss", kind="stable")
    return most["metric"].tolist()


def selection_damage(damage: pd.DataFrame, *, width: str = "single") -> Figure:
    """Held-out loss without the first blocks of every criterion: one row a criterion, one mark a size.

    Args:
        damage: Table of :func:`preln.prune.compare`.
        width: "single" or "double" column.

    Raises:
        InputError: The table holds no removal.
    """
    cut = damage.loc[damage["drop"] > 0]
    if cut.empty:
        raise InputError("damage: holds no removal: nothing to draw")
    names, sizes = _by_damage(cut), sorted(cut["drop"].unique().tolist())
    dense = float(damage.loc[damage["drop"] == 0, "loss"].iloc[0])
    with house_style():
        figure, axes = new_figure(width, 0.9 + 0.19 * len(names))
        axis = axes.flat[0]
        axis.axvline(dense, color=INK, linewidth=0.8, linestyle=":", label="nothing removed")
        for size, colour, marker in zip(sizes, CYCLE, MARKERS, strict=False):
            mine = cut.loc[cut["drop"] == size].set_index("metric").loc[names]
            middle = mine["loss"].to_numpy()
            spread = (mine[["low", "high"]].to_numpy() - mine[["damage"]].to_numpy()).T
            axis.errorbar(
                middle,
                range(len(names)),
                xerr=[abs(spread[0]), abs(spread[1])],
                fmt=marker,
                color=colour,
                markersize=3.5,
                linewidth=0.8,
                label=f"{size} blocks removed",
            )
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.invert_yaxis()
        axis.set_xlabel("held-out loss (nats a token)")
        axis.grid(axis="y", linewidth=0.3, alpha=0.5)
        figure.legend(loc="outside upper left", ncols=2 if width == "single" else 4)
        return figure


def _damage_rows(damage: pd.DataFrame) -> str:
    cut = damage.loc[damage["drop"] > 0]
    sizes = sorted(cut["drop"].unique().tolist())
    table = cut.set_index(["metric", "drop"])
    lines = [
        "| criterion | " + " | ".join(f"loss without {s} [95 % of the rise]" for s in sizes) + " | removed |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for name in _by_damage(cut):
        cells = []
        for size in sizes:
            row = table.loc[(name, size)]
            cells.append(f"{row['loss']:.3f} [+{row['low']:.2f}, +{row['high']:.2f}]".replace("+-", "−"))
        shown = " ; ".join(f"{size}: {_spans(str(table.loc[(name, size), 'layers']))}" for size in sizes)
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {shown} |")
    return "\n".join(lines)


def _spans(layers: str) -> str:
    """``3,4,5`` as ``3–5``; halves by kind."""
    parts = layers.split(",")
    kinds = {kind: [int(p[: -len(kind) or None]) for p in parts if p.endswith(kind)] for kind in ("a", "m")}
    if any(kinds.values()):
        return ", ".join(f"{kind} of {ranges(sorted(kinds[kind]))}" for kind in kinds if kinds[kind])
    return ranges([int(p) for p in parts])


def _order_rows(scores: pd.DataFrame) -> str:
    lines = ["| criterion | removed first … last |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join(map(str, found))} |" for name, found in orders(scores).items()]
    return "\n".join(lines)


def _correlation_rows(correlations: pd.DataFrame) -> str:
    names = list(dict.fromkeys(correlations["metric"]))
    table = correlations.set_index(["metric", "other"])["spearman"]
    short = {name: str(number) for number, name in enumerate(names, 1)}
    lines = ["| | " + " | ".join(short[n] for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for a in names:
        cells = [f"{table[a, b]:.2f}".replace("-", "−") for b in names]
        lines.append(f"| {short[a]} `{a}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _agreement(correlations: pd.DataFrame) -> str:
    mine = correlations.loc[(correlations["other"] == MEASURED) & (correlations["metric"] != MEASURED)]
    ordered = mine.sort_values(by="spearman", ascending=False)
    lines = ["| criterion | rank correlation with single-block damage | shared with it |", "|---|---|---|"]
    lines += [
        f"| `{row['metric']}` | {row['spearman']:.2f} | {row['overlap']:.0%} |"
        for row in ordered.to_dict("records")
    ]
    return "\n".join(lines)


def _provenance(manifest: dict[str, Any], damage: pd.DataFrame) -> str:
    seen, held = manifest["tokens"]["shape"], manifest["held_out"]["shape"]
    dense = damage.loc[damage["drop"] == 0].iloc[0]
    return cell(
        f"{manifest['name']}, {manifest['dtype']}: criteria on {seen[0]} × {seen[1]} tokens of "
        f"{manifest['source']}, losses on {held[0]} × {held[1]} others (its validation split), where the "
        f"whole model has {dense['loss']:.3f} nats; protection {manifest['protect']}, "
        f"seed {manifest['seed']}; commit `{str(manifest['git']['commit'])[:12]}`."
    )


def parts(folder: str | Path) -> dict[str, str]:
    """The generated parts of the page of criteria, by the name of their markers.

    Args:
        folder: What ``preln score --damage`` wrote.
    """
    tables = {n: pd.read_parquet(Path(folder) / f"{n}.parquet") for n in ("scores", "correlations", "damage")}
    manifest = read_json(Path(folder) / "manifest.json")
    return {
        "systems": systems(),
        "selection-provenance": _provenance(manifest, tables["damage"]),
        "selection-damage": _damage_rows(tables["damage"]),
        "selection-agreement": _agreement(tables["correlations"]),
        "selection-correlations": _correlation_rows(tables["correlations"]),
        "selection-orders": _order_rows(tables["scores"]),
    }
