"""The steps of a study before anything is loaded: what they are, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

from preln.experiment.study import DENSE, HealRun, Study, healed_name, pruned_name


@dataclass(frozen=True)
class Planned:
    """One step to come.

    Attributes:
        id: Name of its folder.
        kind: What it does, such as ``probe``.
        needs: Ids of the steps whose results it reads.
        model: The model of the study that it is about: ``dense``, a pruned or a healed one.
        metric: The criterion of a prune step.
        drop: How many blocks a prune step removes.
        run: The run of a heal step.
    """

    id: str
    kind: str
    needs: tuple[str, ...] = ()
    model: str = DENSE
    metric: str = ""
    drop: int = 0
    run: HealRun | None = None


def outline(study: Study) -> list[Planned]:
    """Every step of the study, dependencies first."""
    found = [Planned("verify", "verify")] if study.theory != "none" else []
    found += [Planned(kind, kind) for kind in ("probe", "score", "damage")]
    for drop in study.prune.drop:
        for metric in study.prune.metrics:
            name = pruned_name(metric, drop)
            needs = ("score", "damage")
            found.append(Planned(f"prune-{name}", "prune", needs, name, metric=metric, drop=drop))
    found += [Planned(f"shift-{name}", "shift", (f"prune-{name}",), name) for name in study.prune.probe]
    for run in study.heal_runs:
        for name in run.models:
            found.append(Planned(f"heal-{healed_name(name, run)}", "heal", (f"prune-{name}",), name, run=run))
    for name in study.tasks.models if study.tasks else ():
        maker = made_by(study, name)
        needs = () if name == DENSE else (maker,)
        found.append(Planned(f"evaluate-{maker}", "evaluate", needs, name))
    if study.hypotheses:
        found.append(Planned("decide", "decide", tuple(s.id for s in found if s.kind != "evaluate")))
    return found


def made_by(study: Study, name: str) -> str:
    """The step that makes a model of the study: ``dense``, ``prune-…`` or ``heal-…``."""
    if name == DENSE:
        return DENSE
    cut = {pruned_name(metric, n) for metric in study.prune.metrics for n in study.prune.drop}
    return f"prune-{name}" if name in cut else f"heal-{name}"
