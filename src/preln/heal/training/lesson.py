"""What a student learns from the unpruned model: its logits, or its states where blocks were cut."""

from __future__ import annotations

import torch
from torch import Tensor

from preln.heal.preparing.prepare import Prepared
from preln.heal.rows.examples import Examples
from preln.heal.rows.isolation import forward_inputs
from preln.heal.training.student import Student
from preln.heal.training.teacher import Teacher, distillation_loss, seam_loss
from preln.models.tail import cross_entropies
from preln.models.through import states_at


class Lesson:
    """The loss of a recipe that has a teacher, and its gradient, one portion at a time."""

    def __init__(self, prepared: Prepared, student: Student, teacher: Teacher) -> None:
        """Stand between the two models.

        Args:
            prepared: The student's model; its recipe names the objective.
            student: The same, in two parts.
            teacher: The unpruned model.

        Raises:
            InputError: The student cannot have come from this teacher.
        """
        self.prepared, self.student, self.teacher = prepared, student, teacher
        self.recipe = prepared.recipe
        teacher.check(prepared.plain)

    def counted(self, batch: Examples) -> int:
        """Tokens that the loss is a mean over: supervised ones, or at a seam all that are not padding."""
        return batch.supervised if self.recipe.objective == "distill" else batch.tokens

    def backward(self, part: Examples, total: float) -> float:
        """Sum of the losses of some rows; adds the gradient of that sum over ``total`` to the parameters."""
        return self._distill(part, total) if self.recipe.objective == "distill" else self._seam(part, total)

    def _distill(self, part: Examples, total: float) -> float:
        """``(1 - w) tau^2 KL(teacher || student) + w CE(next token)``, summed over supervised tokens."""
        counts, ids, following = self.student.counted(part)
        depth, weight = self.teacher.depth, self.recipe.next_token_weight
        hidden = self.teacher.states(forward_inputs(self.teacher.model, part), [depth])[depth]
        target = hidden[:, :-1][counts.to(hidden.device)]

        def objective(logits: Tensor, rows: slice) -> Tensor:
            wanted = self.teacher.logits(target[rows], ids[rows]).to(logits.device)
            loss = (1.0 - weight) * distillation_loss(logits, wanted, self.recipe.temperature)
            if weight:
                loss = loss + weight * cross_entropies(logits, following[rows]).sum()
            return loss[None]

        return self.student.backward(self.student.states(part), part, total, objective)

    def _seam(self, part: Examples, total: float) -> float:
        """Squared distance of the states behind every cut from the teacher's, mean over channels, summed."""
        seams = self.prepared.seams
        inputs = forward_inputs(self.student.model, part)
        own = states_at(self.student.model, self.student.blocks, inputs, [s.student for s in seams])
        wanted = self.teacher.states(
            forward_inputs(self.teacher.model, part), [seam.teacher for seam in seams]
        )
        real = torch.ones_like(part.input_ids, dtype=torch.bool)
        if part.attention_mask is not None:
            real = part.attention_mask.bool()
        losses = [
            seam_loss(own[s.student][real.to(own[s.student].device)], wanted[s.teacher][real]) for s in seams
        ]
        loss = torch.stack([each.to(losses[0].device) for each in losses]).sum()
        (loss / total).backward()
        return float(loss.detach())
