"""Forward and backward passes of one batch, in portions that fit, on as many processes as there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.heal.options.settings import TrainingSettings
from preln.heal.prefix.cache import Cache
from preln.heal.prefix.states import Prefix
from preln.heal.preparing.prepare import Prepared
from preln.heal.preparing.sharding import is_sharded
from preln.heal.rows.examples import IGNORED, Examples, mixed_seed
from preln.heal.training.lesson import Lesson
from preln.heal.training.student import Student
from preln.heal.training.teacher import Teacher
from preln.heal.training.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stepper:
    """Gradients and losses of a prepared model, from tokens or from the stored states of a frozen prefix.

    Attributes:
        student: The model in two parts.
        workers: The processes.
        portion: Rows in one pass; halved where memory runs out.
    """

    def __init__(
        self,
        prepared: Prepared,
        settings: TrainingSettings,
        *,
        depth: int = 0,
        prefix: Prefix | None = None,
        held_out: Prefix | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """Stand behind a prepared model.

        Args:
            prepared: The model and what of it trains.
            settings: Resolved settings.
            depth: Blocks in front of this one are frozen and may be left out, where their states are stored.
            prefix: States x[depth] of the training rows; None runs the whole model.
            held_out: Those of the validation rows.
            teacher: The unpruned model, for recipes that learn from it.

        Raises:
            InputError: A precision that cannot be trained in.
        """
        self.prepared, self.settings = prepared, settings
        stored = prefix is not None or held_out is not None
        self.student = Student(prepared, start=depth if stored else 0)
        self.depth, self.prefix, self.held_out = depth, prefix, held_out
        self.workers = Workers(self.student.device)
        self.portion = settings.batch_size // settings.gradient_accumulation
        self.dtype = next(self.student.model.get_input_embeddings().parameters()).dtype
        self.lesson = None if teacher is None else Lesson(prepared, self.student, teacher)
        if settings.precision == "float16":
            raise InputError("precision=float16: its gradients underflow without loss scaling: use bfloat16")

    def training_mode(self) -> None:
        """Evaluation mode everywhere but in the parts that train."""
        self.prepared.training_mode()

    def _numerics(self) -> Any:
        if self.settings.precision is None:
            return nullcontext()
        return torch.autocast(self.student.device.type, dtype=getattr(torch, self.settings.precision))

    def _stored(self, prefix: Prefix | None, rows: Sequence[int]) -> Tensor | None:
        if prefix is None:
            return None
        return prefix.states(self.depth, rows, device=self.student.device, dtype=self.dtype)

    def gradients(self, batch: Examples, rows: Sequence[int], step: int) -> float:
        """Mean of the recipe's loss over the batch's tokens; its gradient is added to the parameters.

        The next token's loss, and a teacher's, count supervised tokens, in nats; a seam's, all that are real.

        Where memory runs out, in one process or several, all halve their portions and begin the batch anew.
        Sharded blocks run in step, which a process that has run out of memory has left: there the run ends.

        Args:
            batch: The rows of the batch, on the CPU.
            rows: Their numbers among all training rows.
            step: Number of the update; fixes dropout.

        Raises:
            InputError: Memory does not hold a single row, or with sharded blocks a portion.
        """
        device = self.student.device
        while True:
            full, loss = None, 0.0
            try:
                loss = self._gradients(batch, rows, step)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                full = error
            if full is not None and self.prepared.sharded:
                mend = "raise gradient_accumulation, or shorten the rows"
                raise InputError(f"memory does not hold {self.portion} rows in one pass: {mend}") from full
            if not self.workers.any(full is not None, device):
                self._add_gradients()
                return self.workers.total(loss, device) / self._total(batch)
            if self.portion == 1:
                raise InputError(
                    f"memory does not hold one row of {batch.input_ids.shape[1]} tokens: shorten the "
                    "rows, or train with gradient_checkpointing, lora or head"
                ) from full
            self.portion = max(1, self.portion // 2)
            for parameter in self.prepared.parameters.values():
                parameter.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _total(self, batch: Examples) -> int:
        """What the batch's loss is a mean over."""
        return max(batch.supervised if self.lesson is None else self.lesson.counted(batch), 1)

    def _turns(self, count: int) -> list[int | None]:
        """Where this process' portions of ``count`` rows start; None for a pass that only keeps step."""
        starts = range(0, count, self.portion)
        return self.workers.turns(starts) if self.prepared.sharded else self.workers.share(starts)

    def _gradients(self, batch: Examples, rows: Sequence[int], step: int) -> float:
        """Sum of the losses of this process' share; its gradient is added to the parameters."""
        total, loss = self._total(batch), 0.0
        for turn in self._turns(len(batch)):
            start = turn or 0
            places = range(start, min(start + self.portion, len(batch)))
            part = batch.take(places).to(self.student.device)
            if turn is None:  # nothing of it counts
                part = dataclasses.replace(part, labels=torch.full_like(part.labels, IGNORED))
            stored = self._stored(self.prefix, [rows[place] for place in places])
            # dropout is a function of seed, update and row, whoever takes the row
            seed = mixed_seed(self.settings.seed, f"dropout {step}", start)
            with generator(seed, self.student.device), self._numerics():
                if self.lesson is not None:
                    loss += self.lesson.backward(part, total)
                else:
                    loss += self.student.backward(self.student.states(part, stored), part, total)
        return loss

    def _add_gradients(self) -> None:
        """Sum the gradients over the processes; those of sharded blocks are summed as they arise."""
        if self.workers.count == 1:
            return
        for parameter in self.prepared.parameters.values():
            if is_sharded(parameter):
                continue
            if parameter.grad is None:  # this process' rows have not touched it, others' may have
                parameter.grad = torch.zeros_like(parameter)
            self.workers.add(parameter.grad)

    def losses(
        self, examples: Examples, places: Sequence[int], stored: Prefix | None = None
    ) -> Tensor | None:
        """Next-token losses (nats) at the supervised tokens of some rows; None where there are none.

        Args:
            examples: Rows, on the CPU.
            places: Which of them, in one pass.
            stored: Their states, where they are stored; else the whole model is run.
        """
        part = examples.take(places).to(self.student.device)
        with self._numerics():
            state = self.student.states(part, self._stored(stored, places))
            return self.student.losses(state, part) if part.supervised else None

    def mean_loss(self, examples: Examples) -> float:
        """Mean next-token loss (nats) over the supervised tokens of held-out rows, in evaluation mode."""
        self.prepared.model.eval()
        loss = 0.0
        with torch.no_grad():
            for turn in self._turns(len(examples)):
                start = turn or 0
                places = range(start, min(start + self.portion, len(examples)))
                losses = self.losses(examples, places, self.held_out)
                if turn is not None and losses is not None:
                    loss += float(losses.sum(dtype=torch.float64))
        return self.workers.total(loss, self.student.device) / max(examples.supervised, 1)


def make_passes(
    prepared: Prepared,
    settings: TrainingSettings,
    model: PreTrainedModel,
    rows: tuple[Examples, Examples | None],
    cache: Cache | None,
    depth: int,
    *,
    teacher: Teacher | None = None,
    fingerprint: str | None = None,
) -> Stepper:
    """What runs the passes: the whole model, or its end behind stored states.

    Args:
        prepared: The model that trains.
        settings: Resolved settings.
        model: The model that it is a copy of, which is whole; stored states are computed by it.
        rows: Those to train on, and those held out.
        cache: Where states are stored.
        depth: Which x[depth] are; 0 for none.
        teacher: The unpruned model, for recipes that learn from it.
        fingerprint: Of the model, if it is known already.
    """
    if cache is None or depth == 0:
        return Stepper(prepared, settings, teacher=teacher)
    size = settings.batch_size // settings.gradient_accumulation
    workers = Workers(next(iter(prepared.parameters.values())).device)

    def stored(rows: Examples, label: str) -> Prefix:
        told: dict[str, Any] = {"batch_size": size, "label": label, "fingerprint": fingerprint}
        return workers.after_main(lambda: cache.states(model, rows, depth, **told))

    train, held_out = rows
    prefix = stored(train, "train")
    other = None if held_out is None else stored(held_out, "validation")
    return Stepper(prepared, settings, depth=depth, prefix=prefix, held_out=other)


def _out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in words


@contextmanager
def generator(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the default generators of the CPU and of ``device`` inside the block; restore them after it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
