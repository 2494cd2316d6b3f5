"""The steps of a placement study: a training and a measurement a model, then the verdicts."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd

from preln.base.files import write_json, write_parquet
from preln.experiment.outline import Planned
from preln.experiment.placement.contrasts import verdict
from preln.experiment.placement.lab import PlacementLab
from preln.experiment.placement.measuring import depth_table, model_numbers, removal_table
from preln.experiment.placement.study import PlacementStudy
from preln.experiment.placement.training import baselines, held_out_loss, train
from preln.experiment.store import Step

# what a kind of step runs, as files and rooms of the package: a change there makes its stored results stale
_RUNS = {
    "train": ("data", "models/scratch.py", "models/tiny.py", "models/loss.py",
              "experiment/placement/training.py"),
    "measure": ("closed_form", "models", "data", "probe", "prune", "experiment/placement/measuring.py"),
    "decide": ("experiment/statistics/decisions.py", "experiment/placement/measuring.py",
               "experiment/placement/contrasts.py"),
}  # fmt: skip
_OWN = ("experiment/placement/steps.py", "experiment/placement/lab.py", "experiment/placement/study.py")


@functools.cache
def code_hash(kind: str) -> str:
    """SHA-256 over the source files that a kind of step runs."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for name in (*_RUNS[kind], *_OWN):
        for path in sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def models_of(study: PlacementStudy) -> list[tuple[str, int, str]]:
    """Placement, seed and name of every model, seed by seed: the first seed is whole soon.

    >>> from types import SimpleNamespace
    >>> models_of(SimpleNamespace(placements=("pre", "post"), seeds=(0,)))
    [('pre', 0, 'pre-s0'), ('post', 0, 'post-s0')]
    """
    return [(p, seed, f"{p}-s{seed}") for seed in study.seeds for p in study.placements]


def placement_outline(study: PlacementStudy) -> list[Planned]:
    """Every step of the study, dependencies first; nothing is loaded."""
    found = []
    for *_, name in models_of(study):
        found.append(Planned(f"train-{name}", "train", (), name))
        found.append(Planned(f"measure-{name}", "measure", (f"train-{name}",), name))
    return [*found, Planned("decide", "decide", tuple(step.id for step in found))]


def placement_steps(lab: PlacementLab) -> list[Step]:
    """Every step with its work and all that its result depends on."""
    study = lab.study
    data = {name: entry["sha256"] for name, entry in lab.identity["data"].items()}
    where = {"device": study.device, "dtype": study.dtype, "sizes": study.sizes.model_dump()}
    models = {name: (placement, seed) for placement, seed, name in models_of(study)}
    found = []
    for planned in placement_outline(study):
        if planned.kind == "decide":
            work = functools.partial(decide_step, lab)
            inputs = {"hypotheses": [c.model_dump() for c in study.hypotheses], "rises": list(study.rises)}
        else:
            placement, seed = models[planned.model]
            function = train_step if planned.kind == "train" else measure_step
            work = functools.partial(function, lab, placement=placement, seed=seed)
            inputs: dict[str, Any] = {"placement": placement, "seed": seed, **where}
            if planned.kind == "train":
                inputs["training"] = study.training.model_dump(exclude={"checkpoint_every"})
                inputs["data"] = {name: data[name] for name in ("training", "validation")}
            else:
                inputs |= {"interval_seed": study.seed}
                inputs["data"] = {name: data[name] for name in ("calibration", "evaluation")}
        inputs["code"] = code_hash(planned.kind)
        found.append(Step(planned.id, planned.kind, inputs, planned.needs, work))
    return found


def train_step(lab: PlacementLab, folder: Path, work: Path, *, placement: str, seed: int) -> None:
    """Train one model: ``weights.safetensors``, ``training.parquet``, ``result.json``."""
    from safetensors.torch import save_file

    model, validation = lab.untrained(placement, seed), lab.tokens["validation"]
    before, began = held_out_loss(model, validation), time.perf_counter()
    trained = train(
        model, lab.tokens["training"], validation, lab.study.training, seed=seed, directory=work / "training"
    )
    seconds, after = time.perf_counter() - began, held_out_loss(model, validation)
    counted = baselines(lab.tokens["training"], validation, len(lab.tokenizer))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    write_parquet(folder / "training.parquet", trained.table())
    finite = math.isfinite(after) and trained.diverged_at is None
    write_json(
        folder / "result.json",
        {
            "placement": placement,
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": trained.tokens,
            "seconds_since_last_start": round(seconds, 3),
            "loss_before": before,
            "loss_after": after if finite else None,
            "diverged_at": trained.diverged_at,
            **{f"{name}_loss": value for name, value in counted.items()},
            # a model that is no better than counting bytes has learnt nothing that depends on depth
            "did_train": finite and after < counted["unigram"],
            "beats_bigram": finite and after < counted["bigram"],
        },
    )


def measure_step(lab: PlacementLab, folder: Path, _work: Path, *, placement: str, seed: int) -> None:
    """Measure one model before and after training: ``depth``, ``removals.parquet``, ``result.json``."""
    told, name = {"placement": placement, "seed": seed}, f"train-{placement}-s{seed}"
    models = {"initial": lab.untrained(placement, seed)}
    if lab.result(name)["loss_after"] is not None:
        models["trained"] = lab.trained(placement, seed)
    depths, manifests = [], {}
    for state, model in models.items():
        table, manifest = depth_table(model, lab.tokens["calibration"], seed=lab.study.seed)
        depths.append(table.assign(**told, state=state))
        manifests[state] = {key: manifest[key] for key in ("placement", "loss", "notes")}
    write_parquet(folder / "depth.parquet", pd.concat(depths, ignore_index=True))
    if "trained" in models:
        table = removal_table(models["trained"], lab.tokens["calibration"], lab.tokens["evaluation"])
        write_parquet(folder / "removals.parquet", table.assign(**told))
    write_json(folder / "result.json", {**told, "measured_placement": manifests})


def decide_step(lab: PlacementLab, folder: Path, _work: Path) -> None:
    """Join the tables of all models and decide: ``verdicts.json``, ``models.parquet``, and the tables."""
    depths, removals, numbers, results = [], [], [], []
    for placement, seed, name in models_of(lab.study):
        result = lab.result(f"train-{name}")
        results.append({k: v for k, v in result.items() if not k.startswith("seconds")})
        depth = pd.read_parquet(lab.path(f"measure-{name}", "depth.parquet"))
        path = lab.path(f"measure-{name}", "removals.parquet")
        curve = pd.read_parquet(path) if path.is_file() else None
        depths.append(depth)
        if curve is not None:
            removals.append(curve)
        for state, rows in depth.groupby("state", sort=True):
            found = model_numbers(rows, curve if state == "trained" else None, lab.study.rises)
            numbers += [(placement, seed, state, quantity, value) for quantity, value in found.items()]
    table = pd.DataFrame(numbers, columns=["placement", "seed", "state", "quantity", "value"])
    untrained = {(r["placement"], r["seed"]) for r in results if not r["did_train"]}
    write_parquet(folder / "depth.parquet", pd.concat(depths, ignore_index=True))
    if removals:
        write_parquet(folder / "removals.parquet", pd.concat(removals, ignore_index=True))
    write_parquet(folder / "numbers.parquet", table)
    write_parquet(folder / "models.parquet", pd.DataFrame(results))
    verdicts = [verdict(contrast, table, untrained) for contrast in lab.study.hypotheses]
    write_json(folder / "verdicts.json", {"verdicts": verdicts})
