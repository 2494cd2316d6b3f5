"""A study as data: model, tokens, what is cut and healed, and the hypotheses fixed before anything runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from preln.experiment.sections import (
    Answers,
    Cut,
    Data,
    Healing,
    HealRun,
    Hypothesis,
    Pruning,
    Resources,
    Strict,
    Tasks,
    Writing,
    healed_name,
    safe_name,
)

DENSE = "dense"
StepKind = Literal[
    "verify", "probe", "score", "damage", "jacobians", "prune", "shift", "heal", "evaluate", "answer", "write"
]


class Study(Strict):
    """A whole study."""

    schema_version: Literal[1] = 1
    name: str
    question: str
    model: str
    device: str = "cpu"
    device_map: Literal["auto", "none"] = "none"  # auto spreads the model over all devices, to measure it
    dtype: str = "float32"
    seed: int = Field(default=0, ge=0, lt=2**32)
    theory: Literal["quick", "full", "none"] = "quick"
    data: Data
    jacobians: int | None = Field(
        default=None, ge=2
    )  # calibration windows whose block Jacobians are measured
    prune: Pruning
    heal: tuple[Healing, ...] = ()
    tasks: Tasks | None = None
    answers: Answers | None = None
    writing: Writing | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    resources: dict[StepKind | Literal["decide"], Resources] = Field(default_factory=dict)

    @property
    def heal_runs(self) -> tuple[HealRun, ...]:
        """The single healing runs, in the order of their entries."""
        return tuple(run for entry in self.heal for run in entry.runs(self.seed))

    def cut(self, name: str) -> Cut:
        """The pruned model of this name.

        Raises:
            KeyError: There is none.
        """
        return {cut.name: cut for cut in self.prune.cuts}[name]

    def origin(self, name: str) -> tuple[str | None, HealRun | None]:
        """The pruned model behind a model of the study and the run that healed it; None where there is none.

        Raises:
            KeyError: No model of this study.
        """
        if name == DENSE:
            return None, None
        for run in self.heal_runs:
            for pruned in run.models:
                if healed_name(pruned, run) == name:
                    return pruned, run
        return self.cut(name).name, None

    @model_validator(mode="after")
    def _check(self) -> Study:
        cuts = self.prune.cuts
        pruned = {cut.name for cut in cuts}
        if len(pruned) < len(cuts):
            raise ValueError("prune: a metric, a number of blocks or a protection is named twice")
        for name in self.prune.probe:
            if name not in pruned:
                raise ValueError(f"prune.probe: {name!r} is none of the pruned models {sorted(pruned)}")
        healed = self._check_healing(pruned)
        self._check_asked(pruned, healed)
        if self.jacobians is not None and self.jacobians > self.data.calibration.sequences:
            raise ValueError(
                f"jacobians: {self.jacobians} windows of {self.data.calibration.sequences}: "
                "give more calibration sequences"
            )
        if self.device_map != "none" and self.heal:
            raise ValueError(
                "device_map: a model that is spread over devices is measured, not healed: "
                "take heal out of the study, or heal with `preln heal --shard on`"
            )
        decided = [(h.id, h.model) for h in self.hypotheses]
        if len(set(decided)) < len(decided):
            raise ValueError("hypotheses: one is listed twice: name another model for one of them")
        for hypothesis in self.hypotheses:
            if hypothesis.model is not None and hypothesis.model not in pruned:
                raise ValueError(
                    f"hypotheses: {hypothesis.model!r} is none of the pruned models {sorted(pruned)}"
                )
        return self

    def _check_healing(self, pruned: set[str]) -> dict[str, bool]:
        """Names of healed models, and whether their weights are kept."""
        healed: dict[str, bool] = {}
        for run in self.heal_runs:
            if not safe_name(run.name):
                raise ValueError(f"heal: label {run.name!r}: use letters, digits, '.', '-' and '_' alone")
            for name in run.models:
                if name not in pruned:
                    raise ValueError(f"heal: {name!r} is none of the pruned models {sorted(pruned)}")
                whole = healed_name(name, run)
                if whole in pruned:
                    raise ValueError(f"heal: {whole!r} is also a pruned model: give the entry a label")
                if whole in healed:
                    raise ValueError(f"heal: {whole!r} would run twice: give one of them a label")
                healed[whole] = run.entry.keep_weights
        return healed

    def _check_asked(self, pruned: set[str], healed: dict[str, bool]) -> None:
        """Whatever is asked of models is asked of models that exist."""
        for section in ("tasks", "answers", "writing"):
            asked = getattr(self, section)
            if asked is None:
                continue
            for name in asked.models:
                if name not in pruned | set(healed) | {DENSE}:
                    raise ValueError(f"{section}: {name!r} is no model of this study")
                if not healed.get(name, True):
                    raise ValueError(
                        f"{section}: the weights of {name!r} are not kept: set keep_weights: true"
                    )
            if len(set(asked.models)) < len(asked.models):
                raise ValueError(f"{section}: a model is named twice")
        if self.writing is not None and self.writing.models[0] != DENSE:
            raise ValueError("writing: name dense first: the others are compared with what it writes")
        if self.writing is not None:
            rows, width = self.data.evaluation.sequences, self.data.evaluation.length
            if self.writing.prompts > rows or self.writing.prompt_tokens > width:
                raise ValueError(f"writing: evaluation has {rows} windows of {width} tokens: ask for fewer")
