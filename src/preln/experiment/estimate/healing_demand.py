"""What a healing run asks for: its updates, validations, stored states, checkpoints, and memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preln.experiment.estimate.training_load import FOUR_BITS, Training, training, update
from preln.experiment.estimate.workload import TABLES, Demand, Load, Shape, Windows, forward
from preln.experiment.outline import Planned
from preln.experiment.sections import HealRun
from preln.heal import get_recipe
from preln.heal.cost.operations import prefix_operations
from preln.heal.prefix.cache import frozen_depth
from preln.heal.preparing.layout import trainable_shapes

if TYPE_CHECKING:
    from preln.experiment.estimate.demands import Desk


class HealingDemand:
    """One healing run."""

    def __init__(self, desk: Desk, step: Planned, run: HealRun, small: Any, shape: Shape) -> None:
        self.desk, self.step, self.run, self.small, self.shape = desk, step, run, small, shape
        entry, data = run.entry, desk.study.data
        self.recipe = get_recipe(run.recipe)
        self.settings = self.recipe.settings_for(**entry.settings()).resolved(data.healing.sequences)
        self._set_portion(self.settings.batch_size // self.settings.gradient_accumulation)
        count = shape.blocks
        self.drop = list(range(count, desk.shape.blocks)) if self.recipe.needs_drop else None
        names = trainable_shapes(small, self.recipe, drop=self.drop).values()
        self.trained = sum(math.prod(each) for each in names)
        self.depth = self._stored(count)

    def _set_portion(self, rows: int) -> None:
        """So many rows in one pass."""
        data = self.desk.study.data
        self.portion = rows
        self.train = Windows(data.healing.sequences, data.healing.length, rows)
        self.held_out = Windows(data.healing_validation.sequences, data.healing_validation.length, rows)

    def _training(self) -> Training:
        return training(
            self.small,
            self.shape,
            self.recipe,
            Windows(self.settings.batch_size, self.train.length, self.portion),
            cached=self.depth,
            checkpointing=self.settings.gradient_checkpointing,
            teacher=self.desk.model if self.recipe.teacher else None,
            drop=self.drop,
        )

    def _stored(self, count: int) -> int:
        """The depth whose states the run takes from a file, as :meth:`preln.heal.Cache.wanted` decides."""
        depth = frozen_depth(self.recipe, count)
        depths = {
            frozen_depth(get_recipe(run.recipe), count)
            for run in self.desk.study.heal_runs
            if self.step.model in run.models
        }
        again = (self.settings.steps or 0) * self.settings.batch_size > self.train.count
        self.depths = len(depths - {0})
        return depth if depth and (again or self.depths > 1) else 0

    def demand(self) -> Demand:
        """Its work, memory and disk."""
        settings, size, shape = self.settings, self.shape.size, self.shape
        steps = settings.steps or 0
        snapshot = self.trained * (size + 2 * self._moment())
        saves = max(0, steps - 1) // (settings.checkpoint_every or steps)
        filled, states = self._fill()
        each, notes = self._training(), []
        held = snapshot if saves else 0.0
        while (memory := self._memory(each.kept, states, held)) > self.desk.room and self.portion > 1:
            self._set_portion(self.portion // 2)
        if self.portion < settings.batch_size // settings.gradient_accumulation:
            each = self._training()
            notes.append("memory holds only a part of a batch in one pass: the loop halves it by itself")
        validations = (
            1 + steps // (settings.eval_every or steps) + bool(steps % (settings.eval_every or steps))
        )
        check = forward(shape, self.held_out, blocks=shape.blocks - self.depth)
        load = (each.step + update(self.trained, shape)) * steps + check * validations
        load += forward(shape, self.desk.windows(self.desk.study.data.evaluation))
        load += filled
        # two copies of the pruned model, its fingerprint, checkpoints of weights and moments
        kept = self.trained * size * self.run.entry.keep_weights
        hashed = shape.bytes * (1 + 2 * bool(self.depth)) + self.desk.shape.bytes * self.recipe.teacher
        load += Load(moved=4 * shape.bytes, disk=saves * snapshot + kept, hashed=hashed + saves * snapshot)
        return Demand(
            self.step,
            load,
            memory,
            TABLES + kept,
            scratch=2 * held,  # a checkpoint is whole before the former one goes
            stored=states if filled.operations else 0.0,
            sharded=True,
            notes=tuple(notes),
        )

    def _moment(self) -> int:
        """Bytes of one moment of AdamW a parameter."""
        return 1 if self.settings.optimizer == "paged_adamw_8bit" else self.shape.size

    def _fill(self) -> tuple[Load, float]:
        """Storing the states of the frozen prefix once a pruned model, and their bytes."""
        if not self.depth:
            return Load(), 0.0
        bytes_ = (
            (self.train.tokens + self.held_out.tokens) * self.shape.hidden * self.shape.size * self.depths
        )
        if self.step.model in self.desk.filled:
            return Load(), bytes_
        self.desk.filled.add(self.step.model)
        deepest = max(
            (r.recipe for r in self.desk.study.heal_runs if self.step.model in r.models),
            key=lambda name: frozen_depth(get_recipe(name), self.shape.blocks),
        )
        depth = frozen_depth(get_recipe(deepest), self.shape.blocks)
        load = Load(disk=2 * bytes_, hashed=bytes_)
        for rows in (self.train, self.held_out):
            part = forward(self.shape, rows, blocks=depth, heads=0.0)
            exact = prefix_operations(self.small, deepest, length=int(rows.length)) * rows.tokens
            load += replace(part, operations=exact)
        return load, bytes_

    def _memory(self, kept: float, states: float, snapshot: float) -> float:
        """Bytes at once.

        The unpruned and the pruned model, the copy that trains (its linear maps in 4 bits where the recipe
        says so; a tied head cloned), gradients and two moments of what trains, ``kept`` numbers a token of a
        portion, and a chunk of logits. A processor also holds copies of a checkpoint and the mapped states.
        """
        shape, trained = self.shape, self.trained
        copy = shape.bytes
        if self.recipe.quantised is not None:
            linear = shape.blocks * shape.held
            copy = linear * FOUR_BITS + (shape.parameters - linear) * shape.size
        if shape.tied and self.recipe.kind == "tail":
            copy += shape.vocabulary * shape.hidden * shape.size
        if self.recipe.kind == "lora":
            copy += trained * shape.size
        tokens = self.portion * self.train.length
        memory = self.desk.base + shape.bytes + copy + trained * (shape.size + 2 * self._moment())
        memory += tokens * kept * shape.size + self.desk.logits(tokens)
        if self.desk.kind == "cpu":
            memory += snapshot + states + trained * shape.size * self.run.entry.keep_weights
        return memory
