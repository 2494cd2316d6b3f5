"""Forward and backward passes over sequence batches, and what has been summed up so far."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from preln.base.errors import InputError
from preln.models import Anatomy
from preln.models.residual import Tokens, forward_losses, undisturbed
from preln.probe.collect import Collector
from preln.probe.gradients import GradientSums
from preln.probe.groups import parameter_groups
from preln.probe.lens import Lens
from preln.probe.measures import HIDDEN, LENS, PARAMETER
from preln.probe.pairs import PairSums
from preln.probe.sums import Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from preln.base.checkpoints import Checkpoints, State


class Passes:
    """Takes sequence batches one after the other; what it holds does not grow with them but for a few sums.

    Args:
        model: A causal model.
        anatomy: Its anatomy.
        wanted: Names of measures.
        pairs: Whether to take angular distances.
        batches: How many sequence batches there will be.
        total: Number of targets in all of them.
        intervals: Whether parameter gradients are sketched for intervals.
        seed: Fixes the sketches' signs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        wanted: set[str],
        *,
        pairs: bool,
        batches: int,
        total: int,
        intervals: bool,
        seed: int,
    ) -> None:
        self.model, self.total, self.done = model, total, 0
        self.sums, self.losses = Sums(), torch.zeros(0, dtype=torch.float64)
        self.pairs = PairSums(anatomy.num_blocks) if pairs else None
        width = model.config.get_text_config().hidden_size
        self.collector = Collector(anatomy, wanted, self.sums, width=width)
        if self.pairs is not None:
            self.collector.after.append(self.pairs.reduce)
        if wanted & set(LENS):
            self.collector.after.append(Lens(model, self.collector.tokens).reduce)
        groups = parameter_groups(anatomy) if wanted & set(PARAMETER) else []
        self.gradients = GradientSums(groups, batches=batches if intervals else 0, seed=seed)
        self._backward = bool(wanted & {*HIDDEN, *PARAMETER})

    def attached(self) -> ExitStack:
        """Hooks on, parameters of interest trainable and without gradients; undone when it closes."""
        stack = ExitStack()
        stack.enter_context(undisturbed(self.model, self.gradients.parameters))
        stack.enter_context(torch.enable_grad() if self._backward else torch.no_grad())
        stack.enter_context(self.collector.attached(gradients=self._backward))
        return stack

    def take(self, part: Tokens) -> None:
        """One forward pass, and a backward pass if a measure needs it.

        Raises:
            InputError: A value is not finite, naming where.
        """
        # gradients are taken of sum/total, the loss itself, so that half precision keeps its range
        self.collector.start(part, float(self.total))
        summed = forward_losses(self.model, part)
        if not bool(torch.isfinite(summed).all()):
            raise InputError("head: the loss is not finite: check the weights, or use a wider --dtype")
        self.losses = torch.cat([self.losses, summed.detach().sum(1).double().cpu()])
        if self._backward:
            leaves = [self.collector.leaf, *self.gradients.parameters]
            (summed.sum() / self.total).backward(inputs=leaves)
            self.gradients.after_batch(int(part.targets.sum()))
        self.collector.finish()
        self.done += 1

    def save(self, checkpoints: Checkpoints) -> None:
        """Store everything that the batches so far have left."""
        keys, sums = self.sums.state()
        held = {"losses": self.losses}
        if self.pairs is not None:
            held["pairs"] = torch.stack(self.pairs.rows)
        for index, sketch in enumerate(self.gradients.running):
            held[f"sketch/{index:04d}"] = sketch
        accumulated = {
            str(index): p.grad.cpu().contiguous()
            for index, p in enumerate(self.gradients.parameters)
            if p.grad is not None
        }
        progress = {
            "keys": keys,
            "pair_tokens": [] if self.pairs is None else self.pairs.tokens,
            "unit_targets": self.gradients.targets,
        }
        groups = {"sums": sums, "rest": held, "grad": accumulated}
        checkpoints.save(self.done, progress | {"done": self.done}, groups)

    def restore(self, stored: State) -> None:
        """Go on from what :meth:`save` stored; inside :meth:`attached`, which clears gradients."""
        progress, groups = stored
        held = groups["rest"]
        self.sums.restore(progress["keys"], groups["sums"])
        self.losses, self.done = held["losses"], progress["done"]
        if self.pairs is not None:
            self.pairs.rows, self.pairs.tokens = list(held["pairs"]), progress["pair_tokens"]
        self.gradients.running = [held[name] for name in sorted(held) if name.startswith("sketch/")]
        self.gradients.targets, self.gradients.done = progress["unit_targets"], self.done
        for index, parameter in enumerate(self.gradients.parameters):
            gradient = groups["grad"].get(str(index))
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
