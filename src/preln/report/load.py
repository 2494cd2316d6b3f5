"""Read a run folder into plain tables.

A run is a folder with `manifest.json`, `config.yaml` and one folder a finished step. A step folder counts
only if it holds `step.json`, and a file counts only if `step.json` lists it with a sha256 that still matches:
what the report shows is what the run wrote, or the report is not built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from preln.base.errors import InputError
from preln.base.files import sha256_file
from preln.base.yaml_files import read_yaml
from preln.report.variants import told_apart

COLUMNS: dict[str, tuple[str, ...]] = {
    "layers.parquet": ("measure", "layer", "site", "statistic", "value"),
    "pairs.parquet": ("start", "size", "angular_distance"),
    "scores.parquet": ("metric", "layer", "score", "rank"),
    "damage.parquet": ("layer", "loss", "delta"),
    "training.parquet": ("step", "tokens", "split", "loss"),
    "documents.parquet": ("task", "doc_id", "doc_hash", "acc"),
}
STATUSES_OF_THEOREMS = ("proved", "refuted", "open")
STATUSES_OF_HYPOTHESES = ("supported", "unsupported", "inconclusive", "untested")


@dataclass(frozen=True)
class Step:
    """One finished step: its folder, its kind and the files it vouches for (name -> sha256)."""

    id: str
    kind: str
    folder: Path
    seconds: float | None
    files: dict[str, str]


@dataclass(frozen=True)
class Run:
    """Everything the report reads of a run; an optional step that did not run leaves None or an empty tuple.

    Attributes:
        path: the run folder.
        name: its folder name, the run's name on the page.
        manifest: `manifest.json` as a dictionary.
        config: `config.yaml` as a dictionary (empty if the file is absent).
        steps: finished steps in the order of their folder names.
        claims: the ledger's claims.
        layers: measures by layer; columns as in `probe/layers.parquet`.
        pairs: angular distances across runs of blocks; columns as in `probe/pairs.parquet`.
        scores: importance of each block; columns as in `score/scores.parquet`.
        damage: loss with one block removed; columns as in `damage/damage.parquet`.
        prunes: one `result.json` a prune step, with the step's `id`; `metric` tells variants apart.
        heals: one `result.json` a heal step, likewise.
        training: all `training.parquet` stacked, after columns `id`, `metric`, `removed`, `recipe`.
        evaluations: one `results.json` an evaluate step, with the step's `id`.
        shifts: gradients of pruned models, by the name of the prune step; columns as `layers`, blocks counted
            in the pruned model.
        documents: outcomes of single documents, by the evaluate step's `id`.
        verdicts: the decided hypotheses.
    """

    path: Path
    name: str
    manifest: dict[str, Any]
    config: dict[str, Any]
    steps: tuple[Step, ...]
    claims: tuple[dict[str, Any], ...] = ()
    layers: pd.DataFrame | None = None
    pairs: pd.DataFrame | None = None
    scores: pd.DataFrame | None = None
    damage: pd.DataFrame | None = None
    prunes: tuple[dict[str, Any], ...] = ()
    heals: tuple[dict[str, Any], ...] = ()
    training: pd.DataFrame | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    shifts: dict[str, pd.DataFrame] = field(default_factory=dict)
    documents: dict[str, pd.DataFrame] = field(default_factory=dict)
    verdicts: tuple[dict[str, Any], ...] = field(default=())


def load_run(path: str | Path) -> Run:
    """Read a run folder, verifying every file that its steps vouch for.

    Args:
        path: the run folder.

    Returns:
        The run's tables.

    Raises:
        InputError: the folder is no run, a file in it is damaged, or a listed file is missing or has
            another sha256.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: name a folder that `preln run` wrote")
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder}: no run (manifest.json is missing): name a folder that `preln run` wrote")
    manifest = _json(folder / "manifest.json")
    # a name that begins with a dot is the run's own workshop: set aside, or not finished yet
    children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    steps = tuple(_step(child) for child in children if (child / "step.json").is_file())
    # resolve() so that `.` and `runs/../runs/a` still have a name to show
    return Run(
        folder, folder.resolve().name, manifest, _config(folder / "config.yaml"), steps, **_tables(steps)
    )


def _tables(steps: tuple[Step, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"claims": (), "prunes": (), "heals": (), "evaluations": (), "verdicts": ()}
    curves: dict[str, pd.DataFrame] = {}
    documents: dict[str, pd.DataFrame] = {}
    shifts: dict[str, pd.DataFrame] = {}
    for step in steps:
        match step.kind:
            case "verify":
                found["claims"] += _records(step, "ledger.json", "claims", need=("id", "status"))
            case "probe":
                found["layers"] = _frame(step, "layers.parquet")
                found["pairs"] = _frame(step, "pairs.parquet")
            case "score":
                found["scores"] = _frame(step, "scores.parquet")
            case "damage":
                found["damage"] = _frame(step, "damage.parquet")
            case "prune":
                found["prunes"] += _result(step, "result.json", need=("metric", "drop", "loss"))
            case "heal":
                found["heals"] += _result(
                    step, "result.json", need=("metric", "drop", "recipe", "loss_after")
                )
                curve = _frame(step, "training.parquet")
                curves |= {} if curve is None else {step.id: curve}
            case "evaluate":
                found["evaluations"] += _result(step, "results.json", need=("tasks",))
                rows = _frame(step, "documents.parquet")
                documents |= {} if rows is None else {step.id: rows}
            case "shift":
                moved = _frame(step, "layers.parquet")
                shifts |= {} if moved is None else {f"prune-{step.id.removeprefix('shift-')}": moved}
            case "decide":
                found["verdicts"] += _records(step, "verdicts.json", "verdicts", need=("id", "status"))
    found["prunes"], found["heals"] = told_apart(found["prunes"], found["heals"])
    training = [_labelled(curves[heal["id"]], heal) for heal in found["heals"] if heal["id"] in curves]
    if training:
        found["training"] = pd.concat(training, ignore_index=True)
    return found | {"documents": documents, "shifts": shifts}


def _labelled(curve: pd.DataFrame, result: dict[str, Any]) -> pd.DataFrame:
    labelled = curve.copy()
    for position, (column, value) in enumerate(
        [
            ("id", result["id"]),
            ("metric", result["metric"]),
            ("removed", len(result["drop"])),
            ("recipe", result["recipe"]),
        ]
    ):
        labelled.insert(position, column, value)
    return labelled


def _step(folder: Path) -> Step:
    record = _json(folder / "step.json")
    files = record.get("files", {})
    if not isinstance(files, dict):
        raise InputError(f"{folder / 'step.json'}: `files` is no table of name to sha256: run the step again")
    for name, expected in files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise InputError(
                f"{folder / 'step.json'}: lists {name!r}, which lies outside the step: run the step again"
            )
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: listed in step.json but missing: run the step again")
        if sha256_file(folder / name) != expected:
            raise InputError(
                f"{folder / name}: its sha256 is not the one in step.json: restore it or run the step again"
            )
    seconds = record.get("seconds")
    return Step(
        id=str(record.get("id", folder.name)),
        kind=str(record.get("kind", folder.name.split("-")[0])),
        folder=folder,
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        files={str(name): str(digest) for name, digest in sorted(files.items())},
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({type(error).__name__}): restore it or run again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object: restore it or run again")
    return content


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_yaml(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): restore it or run again") from error
    return content if isinstance(content, dict) else {}


def _frame(step: Step, name: str) -> pd.DataFrame | None:
    if name not in step.files:
        return None
    path = step.folder / name
    try:
        frame = pd.read_parquet(path)
    except (
        Exception
    ) as error:  # pyarrow raises a family of its own, and OSError, for a file that is no parquet
        raise InputError(
            f"{path}: cannot be read as parquet ({type(error).__name__}): run the step again"
        ) from error
    missing = [column for column in COLUMNS[name] if column not in frame.columns]
    if missing:
        raise InputError(f"{path}: lacks the column {missing[0]!r}: run the step again with this version")
    return frame


def _result(step: Step, name: str, *, need: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    if name not in step.files:
        return ()
    path = step.folder / name
    record = _json(path)
    _require_keys(record, need, path)
    return ({**record, "id": step.id},)


def _records(step: Step, name: str, key: str, *, need: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    if name not in step.files:
        return ()
    path = step.folder / name
    records = _json(path).get(key, [])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: `{key}` is no list of objects: run the step again")
    for record in records:
        _require_keys(record, need, path)
    return tuple(records)


def _require_keys(record: dict[str, Any], need: tuple[str, ...], path: Path) -> None:
    missing = [key for key in need if key not in record]
    if missing:
        raise InputError(f"{path}: lacks {missing[0]!r}: run the step again with this version")
