"""Numbers of the write-up that come from the studies beside the first one, by key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from preln.base.errors import InputError
from preln.report.findings import SHOWN, overall
from preln.report.healing_study import healing_runs, recipe_means
from preln.report.load import Run
from preln.report.paper.comparison import comparison_values
from preln.report.paper.results import HEALING, PLACEMENT, REASONING, Results, rate, tex
from preln.report.summary import dense_loss

Numbers = Iterator[tuple[str, Any]]


def study_values(results: Results) -> Numbers:
    """What every study decided, on which budget, and the numbers of its own."""
    for name, run in results.others.items():
        for key, value in _decided(run):
            yield f"{name}/{key}", value
        for key, value in _budget(run):
            yield f"{name}/{key}", value
        for key, value in {PLACEMENT: _placement, REASONING: _reasoning, HEALING: _healing}.get(
            name, _losses
        )(run):
            yield f"{name}/{key}", value
    yield from comparison_values(results)


def key_of(verdict: dict[str, Any]) -> str:
    """ID and pruned model of a verdict, such as ``HYP-REASONING/reverse-4``."""
    model = str(verdict.get("model") or "")
    words = model.translate(str.maketrans({"_": "-", ",": "", ":": "", " ": "-"}))
    return f"{verdict['id']}/{words}" if words else str(verdict["id"])


def _decided(run: Run) -> Numbers:
    statuses: dict[str, list[str]] = {}
    for verdict in run.verdicts:
        key = f"verdict/{key_of(verdict)}"
        statuses.setdefault(verdict["id"], []).append(verdict["status"])
        yield key, SHOWN[verdict["status"]]
        for name in ("value", "threshold"):
            if verdict.get(name) is not None:
                yield f"{key}/{name}", float(verdict[name])
        for name, bound in zip(("low", "high"), verdict.get("interval") or (), strict=False):
            yield f"{key}/{name}", float(bound)
    for name, found in statuses.items():
        yield f"verdict/{name}/all", SHOWN.get(overall(found), overall(found))
        yield f"verdict/{name}/number", len(found)
        for status in ("supported", "unsupported", "inconclusive"):
            yield f"verdict/{name}/{status}", found.count(status)


def _budget(run: Run) -> Numbers:
    for name, data in run.manifest["data"].items():
        shape = data["shape"]
        yield f"{name}/sequences", int(shape[0])
        yield f"{name}/tokens", int(shape[0] * shape[1])
    yield "blocks", int(run.manifest["model"]["blocks"])
    yield "minutes", f"{sum(step.seconds or 0.0 for step in run.steps) / 60:.0f}"


def _table(run: Run, kind: str, name: str) -> Any:
    """A table of the only step of its kind.

    Raises:
        InputError: It is missing.
    """
    for step in run.steps:
        if step.kind == kind and (step.folder / name).is_file():
            return pd.read_parquet(step.folder / name)
    raise InputError(f"{run.name}: {kind}/{name}: missing, and the paper needs it: run the study again")


def _span(values: Any, style: str = "") -> str:
    """Least and greatest of the seeds' values."""
    low, high = (format(number, style) for number in (values.min(), values.max()))
    return (low if low == high else f"{low} to {high}").replace("-", r"\ensuremath{-}")


def _placement(run: Run) -> Numbers:
    models = _table(run, "decide", "models.parquet")
    yield "models", len(models)
    yield "seeds", int(models["seed"].nunique())
    yield "parameters", int(models["parameters"].min())
    yield "bigram-loss", f"{models['bigram_loss'].iloc[0]:.2f}"
    for name, own in models.groupby("placement"):
        yield f"loss/{name}", _span(own["loss_after"], ".2f")
    numbers = _table(run, "decide", "numbers.parquet")
    for (name, state, quantity), own in numbers.groupby(["placement", "state", "quantity"]):
        whole = str(quantity).startswith("prunable")
        yield f"{state}/{quantity}/{name}", _span(own["value"], ".0f" if whole else ".2f")


def _reasoning(run: Run) -> Numbers:
    answered: dict[str, Any] = {}  # pandas types a selection as frame, series and number at once
    for step in run.steps:
        table = step.folder / "documents.parquet"
        if step.kind == "answer" and table.is_file():
            totals: Any = pd.read_parquet(table).groupby("task")[["bits", "bytes"]].sum()
            answered[step.id.removeprefix("answer-")] = totals["bits"] / totals["bytes"]
        if step.kind == "write" and (step.folder / "summary.parquet").is_file():
            summary: Any = pd.read_parquet(step.folder / "summary.parquet").set_index("measure")["value"]
            for name in ("similarity", "agreed"):
                yield f"{name}/{step.id.removeprefix('write-').replace('_', '-')}", f"{summary[name]:.2f}"
    for model, bits in answered.items():
        for task, value in bits.items():
            yield f"bits/{model.replace('_', '-')}/{str(task).replace('_', '-')}", f"{value:.2f}"
    yield "questions", int(run.config["answers"]["limit"])
    yield "texts", int(run.config["writing"]["prompts"])
    yield from _losses(run)


def _healing(run: Run) -> Numbers:
    runs: Any = healing_runs(run)
    yield "runs", len(runs)
    yield "seeds", int(runs["seed"].nunique())
    yield "run-tokens", int(runs["tokens"].max())
    yield "loss/dense", f"{dense_loss(run):.2f}"
    for row in recipe_means(runs).to_dict("records"):
        model, key = row["model"].replace("_", "-"), f"{row['model'].replace('_', '-')}/{row['recipe']}"
        yield f"loss/{model}", f"{row['loss_before']:.2f}"
        yield f"loss/{key}/{row['learning_rate']:g}", f"{row['loss']:.2f}"
        if row["best"]:
            yield f"loss/{key}", f"{row['loss']:.2f}"
            yield f"rate/{key}", rate(row["learning_rate"])
            yield f"seconds/{key}", tex(float(row["seconds"]), 2)


def _losses(run: Run) -> Numbers:
    yield "loss/dense", f"{dense_loss(run):.2f}"
    for prune in run.prunes:
        yield f"loss/{str(prune['id']).removeprefix('prune-')}", f"{prune['loss']:.2f}"
    for heal in run.heals:
        yield f"loss/{str(heal['id']).removeprefix('heal-')}", f"{heal['loss_after']:.2f}"
