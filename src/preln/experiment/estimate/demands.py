"""What every step of a study asks for: work, memory and disk, from the study and the model's shapes alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from preln.experiment.estimate.healing_demand import HealingDemand
from preln.experiment.estimate.scoring_load import alone, gathering
from preln.experiment.estimate.task_tokens import task_tokens
from preln.experiment.estimate.workload import (
    LOGIT,
    Demand,
    Load,
    Shape,
    Windows,
    backward,
    forward,
    shape_of,
)
from preln.experiment.outline import DENSE, Planned
from preln.experiment.sections import Tokens
from preln.experiment.study import Study
from preln.models import drop_blocks
from preln.prune import CRITERIA, depends_on_size

# Seconds that do not depend on the model, and bytes of libraries and of a first allocation. Fitted to a
# committed run on two cores: the theorems under the quick profile, bootstrap and tables of a step, lm-eval's
# start, a verdict. The full profile is assumed to take four times the quick one.
VERIFY = {"quick": 33.0, "full": 132.0}
FIXED = {
    "probe": 2.5,
    "jacobians": 1.0,
    "answer": 2.0,
    "write": 2.0,
    "shift": 1.0,
    "score": 0.3,
    "damage": 0.3,
    "prune": 0.2,
    "heal": 0.5,
    "evaluate": 2.0,
}
VERDICT = 0.2
LIBRARIES = {"cpu": 0.9e9, "gpu": 0.6e9}
CHUNK = 2**25  # logits held at once (preln.models.tail)
_SKETCH = 8  # rows of the gradient sketches of a probe
# mean tokens of a prompt with its answer (counted with SmolLM2's tokenizer, 100 documents each)
_GOLD = {"jeopardy": 228, "naturalqs": 124, "lambada": 78, "coqa": 555, "drop": 1894, "gsm8k": 911,
         "minerva_prealgebra": 860, "minerva_algebra": 899, "humaneval": 211}  # fmt: skip
_RITZ = 24.0  # products with J and with its transpose for a block's sigma (derived: Lanczos steps)
_SIGMA = 60.0  # times that a norm's exact sigma reads its vector (derived from its iterations)


class Desk:
    """Sizes up the steps of a study in their order; stored states are charged to the first that fills them.

    Args:
        study: The study.
        model: Its model on the meta device, in the study's dtype.
        kind: ``cpu`` or ``gpu``: where checkpoints and stored states take memory.
        room: Bytes that a step may fill on one device; training halves its portions until they fit.
    """

    def __init__(self, study: Study, model: Any, kind: str, room: float = float("inf")) -> None:
        self.study, self.model, self.kind, self.room = study, model, kind, room
        self.shape = shape_of(model)
        self.base = LIBRARIES[kind] + self.shape.bytes
        self.filled: set[str] = set()
        self._small = functools.cache(self._cut)

    def demand(self, step: Planned) -> Demand:
        """What a step asks for.

        Raises:
            InputError: More blocks are to go than the model has, or a recipe does not fit it.
        """
        found: Demand = getattr(self, f"_{step.kind}")(step)
        fixed = Load(fixed=FIXED.get(step.kind, 0.0))
        return replace(found, load=found.load + fixed)

    def loading(self) -> Load:
        """Reading the model, looking for what is not finite, and its fingerprint."""
        size = self.shape.bytes
        return Load(disk=size, moved=3 * size, hashed=size, fixed=3.0)

    def _cut(self, drop: int) -> Any:
        """The model without so many blocks, the last ones: which go is not known before they are scored."""
        count = self.shape.blocks
        return drop_blocks(self.model, range(count - drop, count))

    def windows(self, tokens: Tokens, batch: int = 4) -> Windows:
        """Windows of a set of tokens, in the batches that measuring steps take."""
        return Windows(tokens.sequences, tokens.length, batch)

    def logits(self, tokens: float, *, chunked: bool = True) -> float:
        """Bytes of the logits held at once, in float32, with what a loss makes of them."""
        numbers = tokens * self.shape.vocabulary
        return LOGIT * 4 * (min(numbers, max(CHUNK, 16 * self.shape.vocabulary)) if chunked else numbers)

    def _verify(self, step: Planned) -> Demand:
        return Demand(step, Load(fixed=VERIFY[self.study.theory]), self._idle())

    def _decide(self, step: Planned) -> Demand:
        return Demand(step, Load(fixed=VERDICT * len(self.study.hypotheses)), self._idle())

    def _idle(self) -> float:
        """Bytes of a step that uses no model: it is held all the same, but asks nothing of a GPU."""
        return self.base if self.kind == "cpu" else 0.0

    def _probing(self, shape: Shape, *, norms: bool) -> tuple[Load, float]:
        """A forward and a backward pass to all parameters, with sketches of the gradients."""
        rows = self.windows(self.study.data.calibration)
        rows = replace(rows, batch=min(4, max(1, int(rows.count) // 6)))
        load = forward(shape, rows) + backward(shape, rows, weights=True)
        passes = min(rows.passes, 64)
        load += Load(operations=2.0 * _SKETCH * shape.parameters * passes, moved=passes * shape.bytes)
        if norms:
            load += Load(moved=_SIGMA * 4 * rows.tokens * 2 * shape.blocks * shape.hidden)
        kept = rows.together * shape.blocks * shape.wide * shape.size
        return load, shape.bytes + kept + self.logits(rows.together, chunked=False)

    def _probe(self, step: Planned) -> Demand:
        load, memory = self._probing(self.shape, norms=True)
        return Demand(step, load, self.base + memory)

    def _shift(self, step: Planned) -> Demand:
        small = self.shape.without(self._drop(step.model))
        load, memory = self._probing(small, norms=False)
        return Demand(step, load + Load(moved=2 * small.bytes), self.base + small.bytes + memory)

    def _jacobians(self, step: Planned) -> Demand:
        """Each block forward and back again and again, a window at a time."""
        spec = self.study.data.calibration
        rows = Windows(self.study.jacobians or 0, spec.length, 1)
        once = forward(self.shape, rows, heads=0.0) + backward(self.shape, rows, weights=False)
        kept = rows.together * self.shape.blocks * self.shape.wide * self.shape.size
        load = forward(self.shape, rows) + once * (1.5 * _RITZ)
        return Demand(step, load, self.base + kept + self.logits(rows.together))

    def _score(self, step: Planned) -> Demand:
        size = max(1, round(self.shape.blocks / 4))
        return self._scoring(step, self.study.prune.metrics, size)

    def _scoring(self, step: Planned, metrics: tuple[str, ...], size: int) -> Demand:
        rows, shape = self.windows(self.study.data.calibration), self.shape
        chosen = [CRITERIA[name] for name in metrics]
        needs = frozenset().union(*(c.needs for c in chosen if c.shared))
        load, memory = gathering(shape, rows, needs)
        for each in chosen:
            if not each.shared:
                more, held = alone(each.name, each.needs, shape, rows, size)
                load, memory = load + more, max(memory, held)
        if any(name.startswith("magnitude") for name in metrics):
            load += Load(moved=shape.bytes)
        return Demand(step, load, self.base + memory + self.logits(rows.together))

    def _damage(self, step: Planned) -> Demand:
        rows = self.windows(self.study.data.evaluation)
        load, memory = gathering(self.shape, rows, frozenset({"left_out"}))
        return Demand(step, load, self.base + memory + self.logits(rows.together))

    def _prune(self, step: Planned) -> Demand:
        rows = self.windows(self.study.data.evaluation)
        cut = step.cut
        assert cut is not None  # the outline gives every prune step its cut
        drop = cut.count(self.shape.blocks)
        load, memory = forward(self.shape.without(drop), rows), self.logits(rows.together, chunked=False)
        if depends_on_size(cut.metric):
            again = self._scoring(step, (cut.metric,), drop)
            load, memory = load + again.load, max(memory, again.memory - self.base)
        return Demand(step, load, self.base + memory)

    def _asked(self, step: Planned) -> tuple[Shape, Load, float]:
        """The model that a step asks, the work of making it, and its bytes beside the unpruned one."""
        if step.model == DENSE:
            return self.shape, Load(), 0.0
        copies = 1 + (self.study.origin(step.model)[1] is not None)
        shape = self.shape.without(self._drop(step.model))
        return shape, Load(moved=2 * shape.bytes * copies), shape.bytes * copies

    def _answer(self, step: Planned) -> Demand:
        asked = self.study.answers
        assert asked is not None  # only studies with answers have this step
        shape, load, memory = self._asked(step)
        for name in (task for names in asked.groups.values() for task in names):
            load += forward(shape, Windows(asked.limit, _GOLD[name], 4))
        memory += self.logits(4.0 * max(_GOLD.values()), chunked=False)
        return Demand(step, load, self.base + memory, notes=("tokens of known answers: means of SmolLM2's",))

    def _write(self, step: Planned) -> Demand:
        asked = self.study.writing
        assert asked is not None  # only studies with writing have this step
        shape, load, memory = self._asked(step)
        load += forward(shape, Windows(asked.prompts, asked.prompt_tokens, 8))
        load += forward(shape, Windows(asked.prompts * asked.new_tokens, 1, 8))
        return Demand(step, load, self.base + memory + self.logits(8.0 * asked.prompt_tokens))

    def _evaluate(self, step: Planned) -> Demand:
        tasks = self.study.tasks
        assert tasks is not None  # only studies with tasks have this step
        shape, load, memory = self._asked(step)
        longest, guessed = 0, []
        for name in tasks.names:
            known = task_tokens(name)
            limit = tasks.limit_of(name)
            requests = known.evaluated(limit) * known.requests
            length = known.total(limit) / requests
            load += forward(shape, Windows(requests, length, 8))
            longest = max(longest, known.longest)
            guessed += [] if known.measured else [name]
        memory += self.logits(8.0 * longest, chunked=False)
        notes = (f"tokens assumed, not counted: {', '.join(guessed)}",) if guessed else ()
        return Demand(step, load, self.base + memory, notes=notes)

    def _drop(self, model: str) -> int:
        """How many blocks a pruned or healed model of the study lacks."""
        pruned, _ = self.study.origin(model)
        return self.study.cut(pruned).count(self.shape.blocks) if pruned else 0

    def _heal(self, step: Planned) -> Demand:
        run = step.run
        assert run is not None  # the outline gives every heal step its run
        small = self._small(self._drop(step.model))
        shape = self.shape.without(self._drop(step.model))
        return HealingDemand(self, step, run, small, shape).demand()
