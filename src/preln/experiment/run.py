"""Carry out a study: finished steps are kept, the rest is done, and a killed run continues."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import read_json, write_json
from preln.base.provenance import now, provenance
from preln.experiment.engines import LOCAL, Engine, check_engine, describing_lab, run_steps
from preln.experiment.lab import Lab
from preln.experiment.mirror import MirroredStore, open_store
from preln.experiment.outline import Planned, outline
from preln.experiment.pipeline import build_steps
from preln.experiment.placement import (
    PlacementLab,
    PlacementStudy,
    placement_outline,
    placement_steps,
)
from preln.experiment.store import WORK, RunStore, Step
from preln.experiment.study import Study
from preln.experiment.study_file import study_text, write_study


def run_study(
    study: Study | PlacementStudy, out: str | os.PathLike[str], engine: Engine = LOCAL
) -> dict[str, Any]:
    """Run every step of ``study`` that is not finished under ``out``.

    Args:
        study: The study; see :func:`preln.experiment.read_study`.
        out: The run folder, or an address that fsspec knows (:class:`preln.experiment.mirror.MirroredStore`).
            It may hold an earlier, unfinished or different run of the same study.
        engine: Where steps run; one after another in this process by default.

    Returns:
        ``{"run", "folder", "steps", "ran", "reused", "seconds", "verdicts", "failed_claims"}``.

    Raises:
        InputError: The folder belongs to another study or another process, a stored file was changed, or
            the study asks for what cannot be had.
    """
    check_engine(engine, out)
    store = open_store(out)
    store.open()
    _check_owner(store, study)
    begin = time.perf_counter()
    lab: Any = _lab(study, store, engine)  # an unknown model is refused before anything is written
    steps = _steps(lab)
    with store.locked():
        manifest = _open_manifest(store, study, lab)
        _publish(store)
        ran = run_steps(steps, lab, out, engine)
        if ran or manifest["status"] != "finished":
            manifest |= {"status": "finished", "end": now(), "steps": [s.id for s in steps]}
            write_json(store.root / "manifest.json", manifest)
            _publish(store)
        shutil.rmtree(store.root / WORK / "prefix", ignore_errors=True)  # stored states, of use to runs alone
    verdicts = []
    if study.hypotheses:
        verdicts = read_json(store.root / "decide" / "verdicts.json")["verdicts"]
    return {
        "run": str(out),
        "folder": str(store.root),
        "steps": len(steps),
        "ran": ran,
        "reused": len(steps) - len(ran),
        "seconds": round(time.perf_counter() - begin, 3),
        "verdicts": {verdict_name(v): v["status"] for v in verdicts},
        "failed_claims": []
        if study.theory == "none"
        else failed_claims(read_json(store.root / "verify" / "ledger.json")),
    }


def _publish(store: RunStore) -> None:
    for name in ("config.yaml", "manifest.json"):
        store.publish(name)


def dry_run(
    study: Study | PlacementStudy, out: str | os.PathLike[str], engine: Engine = LOCAL
) -> list[dict[str, Any]]:
    """The steps that :func:`run_study` would go through, without running any.

    The model and the tokens are loaded only where there are results to compare with.

    Returns:
        One ``{"id", "kind", "needs", "state"}`` a step; state is ``kept`` or ``to do``.

    Raises:
        InputError: See :func:`run_study`.
    """
    store = open_store(out)
    store.open()
    _check_owner(store, study)
    if isinstance(store, MirroredStore):
        store = store.listed()
    finished: set[str] = set()
    if (store.root / "manifest.json").is_file():
        for step in _steps(_lab(study, store, engine)):  # what reads a step to do is to do
            if finished.issuperset(step.needs) and store.is_finished(step):
                finished.add(step.id)
    return [
        {
            "id": step.id,
            "kind": step.kind,
            "needs": list(step.needs),
            "state": "kept" if step.id in finished else "to do",
        }
        for step in _planned(study)
    ]


def _lab(study: Study | PlacementStudy, store: RunStore, engine: Engine) -> Lab | PlacementLab:
    """What the steps of a study share."""
    if isinstance(study, PlacementStudy):
        return PlacementLab(study, store, engine)
    return describing_lab(study, store, engine)


def _steps(lab: Lab | PlacementLab) -> list[Step]:
    """Every step of a study, dependencies first."""
    return placement_steps(lab) if isinstance(lab, PlacementLab) else build_steps(lab)


def _planned(study: Study | PlacementStudy) -> list[Planned]:
    """The same before anything is loaded."""
    return placement_outline(study) if isinstance(study, PlacementStudy) else outline(study)


def _check_owner(store: RunStore, study: Study | PlacementStudy) -> None:
    """Refuse a folder that holds something else than a run of this study."""
    if store.root.is_file():
        raise InputError(f"{store.root}: is a file, not a folder: name another --out")
    path = store.root / "manifest.json"
    if path.is_file():
        name = _stored(path).get("study")
        if name != study.name:
            raise InputError(
                f"{store.root}: holds a run of {name!r}, not of {study.name!r}: name another --out"
            )
    # config.yaml is written before the manifest: alone, it is what a stopped run left
    elif store.root.is_dir() and any(
        not p.name.startswith(".") and p.name != "config.yaml" for p in store.root.iterdir()
    ):
        raise InputError(f"{store.root}: the folder is not empty and holds no run: name another --out")


def _stored(path: Path) -> dict[str, Any]:
    """A run's manifest.

    Raises:
        InputError: It is none.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: is no manifest of a run: name another --out, or remove the run's folder")
    return found


def _open_manifest(store: RunStore, study: Any, lab: Any) -> dict[str, Any]:
    """The manifest of a run that continues, or a new one, together with the resolved study."""
    path = store.root / "manifest.json"
    identity = {
        "study": study.name,
        "model": lab.identity["model"] | {"blocks": lab.num_blocks},
        "data": lab.identity["data"],
        "device": study.device,
        "dtype": study.dtype,
        "attn_implementation": lab.identity["attn_implementation"],
        "seeds": {"study": study.seed},
    }
    if path.is_file():
        manifest = _stored(path)
        if all(manifest.get(key) == value for key, value in identity.items()):
            if (store.root / "config.yaml").read_bytes() == study_text(study).encode():
                return manifest
            manifest["status"] = "running"
            write_study(study, store.root / "config.yaml")
            write_json(path, manifest)
            return manifest
    manifest = {**provenance(), **identity, "status": "running", "end": None}
    write_study(study, store.root / "config.yaml")
    write_json(path, manifest)
    return manifest


def verdict_name(verdict: dict[str, Any]) -> str:
    """The hypothesis, and the pruned model that decided it where one was named."""
    return f"{verdict['id']} on {verdict['model']}" if verdict.get("model") else verdict["id"]


def failed_claims(ledger: dict[str, Any]) -> list[str]:
    """Ids of the claims in a stored ledger with a piece of evidence that failed.

    >>> failed_claims({"claims": [{"id": "A", "evidence": [{"outcome": "fail"}]}]})
    ['A']
    """
    return [c["id"] for c in ledger["claims"] if any(e["outcome"] == "fail" for e in c["evidence"])]


def default_out(study_path: str | os.PathLike[str]) -> Path:
    """Where a study goes when no folder is named: ``runs/<name of its file>``."""
    return Path("runs") / Path(study_path).stem
