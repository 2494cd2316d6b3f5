"""Published numbers beside measured ones: what a selection or a recipe keeps, and its place among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from preln.report.load import Run
from preln.report.markdown import cell
from preln.report.summary import dense_loss

COLUMNS = ["share", "selection", "recipe", "models", "kept_least", "kept", "kept_most", "published_place",
           "loss_raw", "raw_place", "loss_healed", "healed_place", "accuracy_kept"]  # fmt: skip
NEAR = 0.05  # how far a share of whole blocks may lie from the published one
FEWEST = 5  # conditions that a rank correlation says something about
# the paper's recipes by what this project calls them; its selections were all healed by LoRA
RECIPES = {"reassess-qlora": "qlora", "reassess-head": "head", "reassess-lora": "lora"} | {
    f"reassess-partial-{k}": f"partial-{k}" for k in (1, 2, 3)
}


def selections(run: Run, published: Any, *, healed_by: str) -> pd.DataFrame:
    """Selections at each published share.

    ``kept`` is the published mean accuracy over the dense model's, least, mean and most over the models that
    were published; the measured side has losses in nats, raw and healed by ``healed_by``, and the share of
    the mean accuracy that was kept where tasks were run. Places count from 1, the best first.

    Args:
        run: A run with prune steps, and heal steps of that recipe.
        published: :func:`preln.experiment.published.published_table` of one source.
        healed_by: Name of the recipe, as in the steps' ``recipe``.
    """
    rows = []
    kept = _kept(published[published["recipe"] == "reassess-lora"], published)
    for share in sorted({float(value) for value in kept["share"]}):
        own = kept[np.isclose(kept["share"].astype(float), share)]
        part = [_selection(run, metric, share, healed_by) for metric in dict.fromkeys(own["metric"])]
        part = [
            {**_over_models(own[own["metric"] == row["selection"]]), **row} for row in part if row is not None
        ]
        rows += _placed(part)
    return pd.DataFrame(rows, columns=COLUMNS)


def recipes(run: Run, published: Any, *, share: float = 0.25) -> pd.DataFrame:
    """Recipes on reverse order at one share, each at its measured best rate by validation loss."""
    mine = published[(published["metric"] == "reverse") & np.isclose(_floats(published["share"]), share)]
    kept, rows = _kept(mine, published), []
    for recipe, name in RECIPES.items():
        own = kept[kept["recipe"] == recipe]
        heals = [h for h in run.heals if h["metric"] == "reverse" and h.get("base_recipe") == name]
        heals = [h for h in heals if "validation_after" in h]  # by which the best rate is chosen
        heals = [h for h in heals if abs(len(h["drop"]) / run.manifest["model"]["blocks"] - share) < NEAR]
        if own.empty or not heals:
            continue
        best = min(heals, key=lambda heal: heal["validation_after"])
        told = {"share": share, "selection": "reverse", "recipe": f"{name} at {best['learning_rate']:g}"}
        told |= {"loss_raw": best["loss_before"], "loss_healed": best["loss_after"]}
        told["accuracy_kept"] = _accuracy_kept(run, best["id"])
        rows.append({**_over_models(own), **told})
    return pd.DataFrame(_placed(rows), columns=COLUMNS)


def beside(run: Run, published: Any, caveats: Sequence[str], *, healed_by: str) -> str:
    """Markdown: both tables, the rank correlation of published with measured places, and the caveats."""
    chosen, healed = selections(run, published, healed_by=healed_by), recipes(run, published)
    parts = [
        "**Selections.** Published: the share of the whole model's mean accuracy that is kept after LoRA at "
        f"1e-5. Measured: loss in nats, raw and after {healed_by}; the whole model has {_dense(run):.2f}.",
        _markdown(chosen),
        _agreement(chosen),
        "**Recipes on reverse order, a quarter of the blocks.** Each at the measured best of its rates.",
        _markdown(healed),
        _agreement(healed),
        "**What keeps the two sides apart.**",
        "\n".join(f"- {cell(each)}" for each in caveats),
    ]
    return "\n\n".join(part for part in parts if part)


def _dense(run: Run) -> float:
    loss = dense_loss(run)
    return float("nan") if loss is None else loss


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _kept(rows: Any, published: Any) -> Any:
    """Rows with ``kept``: their mean accuracy over that of the same model undisturbed."""
    plain = published[published["statistic"] == "mean_acc"]
    dense = plain[plain["metric"].isna() & plain["method"].isna()]
    whole = {str(row["model"]): float(row["value"]) for row in dense.to_dict("records")}
    found = rows[rows["model"].isin(whole) & (rows["statistic"] == "mean_acc") & rows["metric"].notna()]
    values = [float(row["value"]) / whole[str(row["model"])] for row in found.to_dict("records")]
    return found.assign(kept=values)


def _over_models(rows: Any) -> dict[str, Any]:
    kept = _floats(rows["kept"])
    ends = {"kept_least": kept.min(), "kept": kept.mean(), "kept_most": kept.max()}
    return {"models": len(kept), **{name: float(value) for name, value in ends.items()}}


def _selection(run: Run, metric: str, share: float, healed_by: str) -> dict[str, Any] | None:
    """One selection as measured; None where the run did not prune by it."""
    blocks = run.manifest["model"]["blocks"]

    def chosen(results: Any) -> list[dict[str, Any]]:
        own = [r for r in results if r["metric"] == metric]
        return [r for r in own if abs(len(r["drop"]) / blocks - share) < NEAR]

    raw = chosen(run.prunes)
    if not raw:
        return None
    healed = [h for h in chosen(run.heals) if h["recipe"] == healed_by]
    told = {"share": share, "selection": metric, "recipe": healed_by if healed else None}
    told |= {"loss_raw": raw[0]["loss"], "loss_healed": healed[0]["loss_after"] if healed else None}
    told["accuracy_kept"] = _accuracy_kept(run, healed[0]["id"]) if healed else None
    return told


def _accuracy_kept(run: Run, step: str) -> float | None:
    found = {e["id"]: e.get("mean_acc") for e in run.evaluations}
    whole, own = found.get("evaluate-dense"), found.get(f"evaluate-{step}")
    return own / whole if whole and own is not None else None


def _placed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Places by what is kept, by the raw loss, and among those that were healed by the healed loss."""
    for place, value in (
        ("published_place", "kept"),
        ("raw_place", "loss_raw"),
        ("healed_place", "loss_healed"),
    ):
        sign = -1 if value == "kept" else 1
        known = [sign * row[value] for row in rows if row[value] is not None]
        told = len(set(known)) > 1 or len(known) == 1  # all alike have no place
        for row in rows:
            own = row[value] if told else None
            row[place] = None if own is None else 1 + sum(other < sign * own for other in known)
    return rows


def _agreement(table: pd.DataFrame) -> str:
    """Rank correlations of published with measured places, share by share, in words."""
    from scipy.stats import spearmanr

    told = []
    for share, own in _by_share(table):
        for place, what in (("raw_place", "raw"), ("healed_place", "healed")):
            both = own[["published_place", place]].dropna().astype(float)
            if len(both) >= FEWEST and both.nunique().min() > 1:
                found: Any = spearmanr(both["published_place"], both[place])
                told.append(f"{found.statistic:+.2f} with {what} ones ({len(both)} at a share of {share:g})")
    return f"Rank correlation of published with measured places: {'; '.join(told)}." if told else ""


def _by_share(table: pd.DataFrame) -> Any:
    return table.groupby("share", sort=True)


def _markdown(table: pd.DataFrame) -> str:
    lines = [
        "| share | selection | healed by | published, kept [least, most] of models | place | loss raw | "
        "place | loss healed | place | accuracy kept |",
        "|---" * 10 + "|",
    ]
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        kept = f"{row['kept']:.2f} [{row['kept_least']:.2f}, {row['kept_most']:.2f}] of {row['models']}"
        lines.append(
            f"| {row['share']:g} | `{row['selection']}` | {row['recipe'] or '–'} | {kept} | "
            f"{_place(row['published_place'])} | {row['loss_raw']:.2f} | {_place(row['raw_place'])} | "
            f"{_number(row['loss_healed'])} | {_place(row['healed_place'])} | "
            f"{_number(row['accuracy_kept'])} |"
        )
    return "\n".join(lines)


def _place(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
