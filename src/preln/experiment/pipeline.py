"""From a study to its steps, in an order in which each finds what it needs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preln.experiment import asking
from preln.experiment import steps as work
from preln.experiment.lab import Lab
from preln.experiment.outline import Planned, outline
from preln.experiment.store import Step
from preln.prune import depends_on_size

# the rooms whose code a kind of step runs: a change there makes its stored results stale
_ROOMS = {
    "verify": ("base", "theory", "closed_form", "testing"),
    "probe": ("base", "closed_form", "models", "data", "probe"),
    "score": ("base", "models", "data", "prune"),
    "damage": ("base", "models", "data", "prune"),
    "prune": ("base", "models", "data", "prune", "evaluate"),
    "jacobians": ("base", "closed_form", "models", "linops", "data", "probe"),
    "shift": ("base", "closed_form", "models", "data", "prune", "probe"),
    "heal": ("base", "models", "data", "prune", "heal", "evaluate"),
    "evaluate": ("base", "models", "data", "prune", "heal", "evaluate"),
    "answer": ("base", "models", "data", "prune", "heal", "evaluate"),
    "write": ("base", "models", "data", "prune", "heal", "evaluate"),
    "decide": ("base", "experiment"),
}
_OWN = ("steps.py", "asking.py", "lab.py")


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
    found = []
    for planned in outline(lab.study):
        function, inputs = _work(lab, planned)
        inputs["code"] = code_hash(planned.kind)
        found.append(Step(planned.id, planned.kind, inputs, planned.needs, functools.partial(function, lab)))
    return found


def _work(lab: Lab, planned: Planned) -> tuple[Callable[..., None], dict[str, Any]]:
    """What a step calls, and all that its result depends on beside the code."""
    study, identity = lab.study, lab.identity
    data = {name: entry["sha256"] for name, entry in identity["data"].items()}
    where = {"device": study.device, "dtype": study.dtype, "seed": study.seed}
    if study.device_map != "none":  # only then, so that what was stored before the key came stays valid
        where["device_map"] = study.device_map
    inputs: dict[str, Any] = {"model": identity["model"]["sha256"], **where}
    partial = functools.partial
    match planned.kind:
        case "verify":
            return work.verify_step, {"profile": study.theory}
        case "probe":
            return work.probe_step, inputs | {"calibration": data["calibration"]}
        case "score":
            inputs |= {"calibration": data["calibration"], "metrics": list(study.prune.metrics)}
            return work.score_step, inputs
        case "damage":
            return work.damage_step, inputs | {"evaluation": data["evaluation"]}
        case "jacobians":
            windows = study.jacobians
            assert windows is not None  # only then has a study this step
            inputs |= {"calibration": data["calibration"], "windows": windows}
            return partial(work.jacobians_step, windows=windows), inputs
        case "prune":
            cut = planned.cut
            assert cut is not None  # the outline gives every prune step its cut
            if depends_on_size(cut.metric):
                inputs["calibration"] = data["calibration"]
            inputs |= {"evaluation": data["evaluation"], "metric": cut.metric, "drop": cut.drop}
            inputs["protect"] = cut.protect
            return partial(work.prune_step, cut=cut), inputs
        case "shift":
            inputs["calibration"] = data["calibration"]
            return partial(work.shift_step, pruned=planned.model), inputs
        case "heal":
            run = planned.run
            assert run is not None  # the outline gives every heal step its run
            unmoved = {"models", "checkpoint_every", "learning_rate", "seeds", "label"}
            told = run.entry.model_dump(mode="json", exclude=unmoved)
            told |= {"learning_rate": run.learning_rate, "name": run.name, "seed": run.seed}
            return partial(work.heal_step, pruned=planned.model, run=run), inputs | {"data": data} | told
        case "evaluate":
            tasks = study.tasks
            assert tasks is not None  # only studies with tasks have this step
            inputs |= {"tasks": list(tasks.names), "limit": tasks.limit}
            return partial(asking.evaluate_step, name=planned.model), inputs
        case "answer":
            asked = study.answers
            assert asked is not None  # only studies with answers have this step
            inputs |= {"groups": {k: list(v) for k, v in asked.groups.items()}, "limit": asked.limit}
            return partial(asking.answer_step, name=planned.model), inputs
        case "write":
            writing = study.writing
            assert writing is not None  # only studies with writing have this step
            inputs |= {"evaluation": data["evaluation"], **writing.model_dump(exclude={"models"})}
            return partial(asking.write_step, name=planned.model), inputs
        case "decide":
            listed = [hypothesis.model_dump() for hypothesis in study.hypotheses]
            function = partial(work.decide_step, hypotheses=study.hypotheses)
            return function, {"hypotheses": listed, "seed": study.seed}
    raise AssertionError(planned.kind)  # the outline and this list belong together
