"""The unpruned model as a target: its logits, its hidden states where blocks were cut, and the two losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preln.base.errors import InputError
from preln.heal.preparing.layout import Seam, find_seams
from preln.models import find_blocks
from preln.models.tail import Tail
from preln.models.through import states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teacher:
    """The unpruned model, which stays as it is: run in evaluation and inference mode, never trained.

    What it returns are ordinary tensors without a graph, so that a student's loss may save them.

    Attributes:
        model: The unpruned model.
        blocks: Its blocks.
        drop: The blocks that the student lacks; empty where that does not matter.
        seams: Where they were cut (see :func:`preln.heal.preparing.layout.find_seams`).
    """

    def __init__(self, model: PreTrainedModel, drop: Iterable[int] = ()) -> None:
        """Take a model as a target.

        Args:
            model: The unpruned model; not copied, so it must not be the one that trains.
            drop: The blocks that were removed from it, for the seams.

        Raises:
            InputError: The model has no list of blocks, or no such blocks.
        """
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.drop = tuple(drop)
        self.seams: list[Seam] = find_seams(len(self.blocks), self.drop) if self.drop else []
        with self._frozen():
            self._tail = Tail(model, block=self.blocks[0])

    @property
    def depth(self) -> int:
        """L: the depth of the last state."""
        return len(self.blocks)

    def check(self, student: PreTrainedModel) -> None:
        """Whether a student could have come from this model by removing ``drop``.

        Raises:
            InputError: Another vocabulary, another width, or another number of blocks.
        """
        own, other = (m.config.get_text_config() for m in (self.model, student))
        for name in ("vocab_size", "hidden_size"):
            if getattr(own, name) != getattr(other, name):
                raise InputError(
                    f"teacher: its {name} is {getattr(own, name)}, the student's {getattr(other, name)}: "
                    "give the model that the student was pruned from"
                )
        count = len(find_blocks(student)[1])
        if self.drop and count != self.depth - len(self.drop):
            raise InputError(
                f"teacher: {self.depth} blocks less {len(self.drop)} are not the student's {count}: give the "
                "model that the student was pruned from, and all blocks that were removed"
            )

    def states(self, inputs: Mapping[str, Any], depths: Iterable[int]) -> dict[int, Float[Tensor, "n t d"]]:
        """x[l] for every depth asked for, from one pass of the batch that ends at the deepest.

        Args:
            inputs: Keyword arguments of the model, the same as the student's.
            depths: Each from 0 to L; L, the state before the final norm, is what :meth:`logits` takes.

        Raises:
            InputError: A depth out of range.
        """
        with self._frozen():
            found = states_at(self.model, self.blocks, inputs, depths)
        # copies outside inference mode: ordinary tensors, which autograd may save
        return {depth: state.clone() for depth, state in found.items()}

    def logits(self, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
        """Logits of a chunk of tokens from their states x[L]; ``ids`` are the tokens at which the states are.

        Raises:
            InputError: What follows the blocks mixes tokens.
        """
        with self._frozen():
            found = self._tail.reduce(hidden, ids, lambda logits, _: logits)
        return found.clone()  # outside inference mode: an ordinary tensor

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation and inference mode; modules that were in training mode are so again afterwards."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True


def distillation_loss(
    student_logits: Float[Tensor, "n v"], teacher_logits: Float[Tensor, "n v"], tau: float = 1.0
) -> Float[Tensor, ""]:
    """``tau^2 sum over tokens of KL(softmax(t / tau) || softmax(s / tau))``, in nats, in float32 or wider.

    The factor keeps the gradient's size as tau grows (Hinton et al. 2015): with respect to the student's
    logits it is ``tau (softmax(s / tau) - softmax(t / tau))``. Where the teacher's probability is 0, the term
    is 0.

    Args:
        student_logits: With a graph.
        teacher_logits: Of the same tokens and vocabulary.
        tau: Temperature.

    Raises:
        InputError: The shapes differ, or tau is not positive.

    >>> float(distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])))
    0.0
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise InputError(
            f"logits of student and teacher: shapes {shapes} differ: use one vocabulary and batch"
        )
    if not tau > 0:
        raise InputError(f"tau={tau}: must be positive")
    target = (_wide(teacher_logits.detach()) / tau).log_softmax(-1)
    log_q = (_wide(student_logits) / tau).log_softmax(-1)
    p = target.exp()
    return tau**2 * torch.where(p > 0, p * (target - log_q), 0.0).sum()


def seam_loss(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """``sum over tokens of |s - t|^2 / d``, in float32 or wider: n times the mean squared error.

    Its gradient with respect to the student's state is ``2 (s - t) / d``.

    Args:
        student: States of the tokens that count, at ``seam.student`` of the pruned model, with a graph.
        teacher: States of the same tokens at ``seam.teacher`` of the unpruned model.

    Raises:
        InputError: The shapes differ.

    >>> float(seam_loss(torch.zeros(3, 2), torch.ones(3, 2)))
    3.0
    """
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise InputError(f"states of student and teacher: shapes {shapes} differ: use one width and batch")
    return (_wide(student) - _wide(teacher.detach())).square().mean(-1).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
