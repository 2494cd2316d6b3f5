"""The steps of a study before anything is loaded: what they are, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

from preln.experiment.sections import Cut, HealRun, healed_name
from preln.experiment.study import DENSE, Study


@dataclass(frozen=True)
class Planned:
    """One step to come.

    Attributes:
        id: Name of its folder.
        kind: What it does, such as ``probe``.
        needs: Ids of the steps whose results it reads.
        model: The model of the study that it is about: ``dense``, a pruned or a healed one.
        cut: What a prune step removes.
        run: The run of a heal step.
    """

    id: str
    kind: str
    needs: tuple[str, ...] = ()
    model: str = DENSE
    cut: Cut | None = None
    run: HealRun | None = None


def outline(study: Study) -> list[Planned]:
    """Every step of the study, dependencies first."""
    found = [Planned("verify", "verify")] if study.theory != "none" else []
    found += [Planned(kind, kind) for kind in ("probe", "score", "damage")]
    found += [Planned("jacobians", "jacobians")] if study.jacobians is not None else []
    for cut in study.prune.cuts:
        found.append(Planned(f"prune-{cut.name}", "prune", ("score", "damage"), cut.name, cut=cut))
    found += [Planned(f"shift-{name}", "shift", (f"prune-{name}",), name) for name in study.prune.probe]
    for run in study.heal_runs:
        for name in run.models:
            found.append(Planned(f"heal-{healed_name(name, run)}", "heal", (f"prune-{name}",), name, run=run))
    for kind, asked in (("evaluate", study.tasks), ("answer", study.answers), ("write", study.writing)):
        for name in asked.models if asked else ():
            maker = made_by(study, name)
            needs = () if name == DENSE else (maker,)
            if kind == "write" and name != DENSE:  # it is compared with what the unpruned model writes
                needs += (f"write-{DENSE}",)
            found.append(Planned(f"{kind}-{maker}", kind, needs, name))
    if study.hypotheses:
        found.append(Planned("decide", "decide", tuple(step.id for step in found)))
    return found


def made_by(study: Study, name: str) -> str:
    """The step that makes a model of the study: ``dense``, ``prune-…`` or ``heal-…``."""
    pruned, run = study.origin(name)
    return f"heal-{name}" if run else f"prune-{pruned}" if pruned else DENSE
