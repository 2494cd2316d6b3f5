"""From a study to its steps, in an order in which each finds what it needs."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from preln.experiment import steps as work
from preln.experiment.lab import Lab
from preln.experiment.store import Step
from preln.experiment.study import DENSE, healed_name, pruned_name
from preln.prune import depends_on_size

# the rooms whose code a kind of step runs: a change there makes its stored results stale
_ROOMS = {
    "verify": ("base", "theory", "closed_form", "testing"),
    "probe": ("base", "closed_form", "models", "data", "probe"),
    "score": ("base", "models", "data", "prune"),
    "damage": ("base", "models", "data", "prune"),
    "prune": ("base", "models", "data", "prune", "evaluate"),
    "shift": ("base", "closed_form", "models", "data", "prune", "probe"),
    "heal": ("base", "models", "data", "prune", "heal", "evaluate"),
    "evaluate": ("base", "models", "data", "prune", "heal", "evaluate"),
    "decide": ("base", "experiment"),
}
_OWN = ("steps.py", "lab.py")


@functools.cache
def code_hash(kind: str) -> str:
    """SHA-256 over the source files that a kind of step runs."""
    root = Path(__file__).resolve().parents[1]
    files = [path for room in _ROOMS[kind] for path in sorted((root / room).rglob("*.py"))]
    files += [root / "experiment" / name for name in _OWN]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def build_steps(lab: Lab) -> list[Step]:
    """Every step of the study, dependencies first."""
    study, identity = lab.study, lab.identity
    where = {"device": study.device, "dtype": study.dtype, "seed": study.seed}
    data = {name: entry["sha256"] for name, entry in identity["data"].items()}

    def step(identifier: str, kind: str, function: Any, needs: tuple[str, ...] = (), **inputs: Any) -> Step:
        return Step(
            identifier, kind, {**inputs, "code": code_hash(kind)}, needs, functools.partial(function, lab)
        )

    on_model = {"model": identity["model"]["sha256"], **where}
    found = []
    if study.theory != "none":
        found.append(step("verify", "verify", work.verify_step, profile=study.theory))
    found += [
        step("probe", "probe", work.probe_step, **on_model, calibration=data["calibration"]),
        step(
            "score",
            "score",
            work.score_step,
            **on_model,
            calibration=data["calibration"],
            metrics=list(study.prune.metrics),
        ),
        step("damage", "damage", work.damage_step, **on_model, evaluation=data["evaluation"]),
    ]
    for drop in study.prune.drop:
        for metric in study.prune.metrics:
            again = {"calibration": data["calibration"]} if depends_on_size(metric) else {}
            found.append(
                step(
                    f"prune-{pruned_name(metric, drop)}",
                    "prune",
                    functools.partial(work.prune_step, metric=metric, drop=drop),
                    ("score", "damage"),
                    **on_model,
                    evaluation=data["evaluation"],
                    metric=metric,
                    drop=drop,
                    protect=study.prune.protect,
                    **again,
                )
            )
    for name in study.prune.probe:
        needs = (f"prune-{name}",)
        function = functools.partial(work.shift_step, pruned=name)
        found.append(
            step(f"shift-{name}", "shift", function, needs, **on_model, calibration=data["calibration"])
        )
    for run in study.heal_runs:
        for name in run.models:
            found.append(
                step(
                    f"heal-{healed_name(name, run)}",
                    "heal",
                    functools.partial(work.heal_step, pruned=name, run=run),
                    (f"prune-{name}",),
                    **on_model | {"seed": run.seed},
                    data=data,
                    learning_rate=run.learning_rate,
                    name=run.name,
                    **run.entry.model_dump(
                        mode="json", exclude={"models", "checkpoint_every", "learning_rate", "seeds", "label"}
                    ),
                )
            )
    if study.tasks is not None:
        for name in study.tasks.models:
            made_by = work.step_of_model(lab, name)
            needs = () if name == DENSE else (made_by,)
            found.append(
                step(
                    f"evaluate-{made_by}",
                    "evaluate",
                    functools.partial(work.evaluate_step, name=name),
                    needs,
                    **on_model,
                    tasks=list(study.tasks.names),
                    limit=study.tasks.limit,
                )
            )
    if study.hypotheses:
        found.append(
            step(
                "decide",
                "decide",
                functools.partial(work.decide_step, hypotheses=study.hypotheses),
                tuple(s.id for s in found if s.kind != "evaluate"),
                hypotheses=[h.model_dump() for h in study.hypotheses],
                seed=study.seed,
            )
        )
    return found
