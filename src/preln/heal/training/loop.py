"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.base.progress import track
from preln.heal.options.settings import TrainingSettings
from preln.heal.preparing.prepare import Prepared
from preln.heal.preparing.sharding import clip_gradients, cut, gathered, held_bytes, join, part_groups
from preln.heal.rows.examples import Examples, batch_rows
from preln.heal.training.checkpoint import Progress, optimizer_tensors, restore_optimizer
from preln.heal.training.divergence import forward_site, gradient_site
from preln.heal.training.optimizers import make_optimizer
from preln.heal.training.step import Stepper


@dataclass
class Fit:
    """Outcome of the loop.

    Attributes:
        progress: Counts and the history, with rows of ``step``, ``tokens``, ``seconds``, ``split``, ``loss``
            and ``learning_rate``. A ``train`` row holds the loss of its batch *before* that update.
        tensors: The trained tensors that were selected: the last, or those of the best validation loss.
            Of a sharded model process 0 alone has them.
        selected_step: The step they are of.
        held_bytes: Bytes of weights and of the optimizer's state that this process held.
    """

    progress: Progress
    tensors: dict[str, Tensor]
    selected_step: int
    held_bytes: int


def fit(
    prepared: Prepared,
    examples: Examples,
    settings: TrainingSettings,
    *,
    validation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    stepper: Stepper | None = None,
) -> Fit:
    """Train the prepared parameters with AdamW on the mean next-token loss of each batch.

    Only the prepared parameters require a gradient, so autograd keeps nothing of a frozen prefix. The loss of
    a batch is the mean over its supervised tokens, however it is portioned. With ``checkpoints``, a run that
    was stopped continues, on the CPU to the same bits as one that was not.

    Args:
        prepared: Model and parameters; changed in place, and left holding the selected tensors.
        examples: Training rows.
        settings: Resolved settings (``steps`` given).
        validation: Rows whose loss is measured at the start, every ``eval_every`` steps and at the end.
        checkpoints: Where to continue from and save to.
        on_row: Called with every new row of the history.
        stepper: Runs the passes; the prepared model as a whole if None.

    Raises:
        InputError: A loss or a gradient is not finite (the line names the step), or a checkpoint is refused.
    """
    steps = settings.steps
    if steps is None:
        raise InputError(f"epochs={settings.epochs}: resolve the settings for a number of rows first")
    parameters = list(prepared.parameters.values())
    passes = stepper or Stepper(prepared, settings)
    workers = passes.workers
    optimizer, notes = make_optimizer(parameters, settings)
    part_groups(optimizer)
    prepared.notes.extend(notes)
    progress = Progress()
    best: dict[str, Tensor] | None = None

    def record(split: str, loss: float, rate: float) -> None:
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "split": split,
            "loss": loss,
            "learning_rate": rate,
        }
        progress.history.append(row)
        if on_row is not None:
            on_row(row)

    def diverged(what: str, step: int, where: str | None) -> NoReturn:
        if checkpoints is not None and workers.main:
            checkpoints.clear()  # they lead nowhere else, and bad input leaves nothing behind
        mend = "lower the learning rate, or check the model's weights and dtype"
        first = f", first {where}" if where else ""
        raise InputError(f"the {what} is not finite at step {step}{first}: {mend}")

    def validate(rate: float) -> None:
        nonlocal best
        if validation is None:
            return
        loss = passes.mean_loss(validation)
        if not math.isfinite(loss):
            diverged("validation loss", progress.step, forward_site(passes, validation))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            best = prepared.parts() if settings.select == "best" else None
        else:
            progress.stale += 1
        record("validation", loss, rate)

    stored = None if checkpoints is None else checkpoints.latest()
    if stored is None:
        validate(0.0)
    else:
        former, tensors = stored
        progress = Progress(**former)
        prepared.load(tensors["trained"])
        restore_optimizer(optimizer, prepared.parameters, tensors["optimizer"])
        if "best" in tensors:
            best = {name: cut(tensor, prepared.parameters[name]) for name, tensor in tensors["best"].items()}

    begun = progress.seconds, progress.tokens

    def pace() -> str:
        last = next(row["loss"] for row in reversed(progress.history) if row["split"] == "train")
        speed = (progress.tokens - begun[1]) / max(progress.seconds - begun[0], 1e-9)
        return f"loss {last:.4f}, {speed:.0f} tokens/s"

    passes.training_mode()
    remaining = range(progress.step, steps)
    shown = track(remaining, label=f"heal {prepared.recipe.name}", total=len(remaining), state=pace)
    for step in shown if workers.main else remaining:
        began = time.perf_counter()
        rate = settings.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_rows(len(examples), settings.batch_size, settings.seed, step)
        batch = examples.take(rows)
        loss = passes.gradients(batch, rows, step)
        norm = clip_gradients(parameters, settings.max_grad_norm)
        if not math.isfinite(loss):
            diverged("loss", step + 1, forward_site(passes, batch))
        if not math.isfinite(norm):
            diverged("gradient", step + 1, gradient_site(passes, batch, rows, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step = step + 1
        progress.tokens += batch.tokens
        progress.supervised += batch.supervised
        progress.seconds += time.perf_counter() - began
        record("train", loss, rate)

        last = progress.step == steps
        if last or (settings.eval_every and progress.step % settings.eval_every == 0):
            validate(rate)
            passes.training_mode()
        if settings.early_stop and progress.stale >= settings.early_stop:
            break
        due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
        if checkpoints is not None and due and not last:
            keep = workers.main  # gathering takes every process
            moments = optimizer_tensors(optimizer, prepared.parameters, keep=keep)
            groups = {"trained": prepared.tensors(keep=keep), "optimizer": moments}
            if best is not None:
                joined = {name: join(part, prepared.parameters[name]) for name, part in best.items()}
                groups["best"] = gathered(joined, keep=keep)
            if keep:
                checkpoints.save(progress.step, vars(progress), groups)

    selected = progress.step
    if best is not None and progress.best_step is not None:
        prepared.put(best)
        selected = progress.best_step
    kept = prepared.tensors(keep=workers.main or not prepared.sharded)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return Fit(progress, kept, selected, held_bytes([*prepared.model.parameters(), *moments]))
