"""The model that trains, in two parts: tokens to x[L], and from x[L] to the loss where it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.heal.preparing.parts import Layout, norm_without_running
from preln.heal.rows.examples import IGNORED, Examples
from preln.heal.rows.isolation import forward_inputs
from preln.models import find_blocks
from preln.models.surgery import view
from preln.models.tail import Tail, cross_entropies
from preln.models.through import StandIn, states_at

if TYPE_CHECKING:
    from preln.heal.preparing.prepare import Prepared

# from the logits [rows, v] of a chunk, and its place among the counted tokens, to one number a token
Objective = Callable[[Tensor, slice], Tensor]


class Student:
    """A prepared model, run up to x[L] as a whole or from a stored x[start] on, and a head in chunks.

    Final norm and head see only the tokens whose prediction counts, and the logits of one chunk exist at a
    time: the loss and its gradient are those of the plain way, without its ``[tokens, vocabulary]`` tensors.

    Attributes:
        model: The causal model inside the prepared one (inside peft's wrapper, if there is one).
        blocks: Its blocks.
        device: Where its embedding is.
        lockstep: Whether every pass goes all the way back, so that sharded blocks gather their weights
            equally often in every process.
        checkpointed_norm: The final norm, where blocks run under gradient checkpointing; else None.
    """

    def __init__(self, prepared: Prepared, *, start: int = 0, rows: int | None = None) -> None:
        """Stand behind a prepared model.

        Args:
            prepared: The model and what of it trains.
            start: Blocks in front of this one are not run: their states are given to :meth:`states`.
            rows: Tokens in a chunk of the head (default: by the size of the vocabulary).
        """
        self.model: Any = prepared.plain
        self.blocks = list(find_blocks(self.model)[1])
        self.start = start
        self.checkpointed_norm = self._norm() if prepared.checkpointed else None
        self.device = next(self.model.get_input_embeddings().parameters()).device
        self.lockstep = prepared.sharded
        was = self.model.training
        self.model.eval()
        self._tail = Tail(self.model, rows=rows, block=self.blocks[0])
        self._given = StandIn(self.model, self.blocks[0])
        self.model.train(was)
        kept = self.blocks[start:]
        self._view: Any = view(self.model, [self._given, *kept]) if start and kept else None

    def states(
        self, examples: Examples, stored: Float[Tensor, "n t d"] | None = None
    ) -> Float[Tensor, "n t d"]:
        """x[L] of some rows, with its graph.

        Args:
            examples: The rows, on :attr:`device`.
            stored: Their x[start], where the student starts there.
        """
        if stored is not None and self.start == len(self.blocks):
            return stored
        inputs = forward_inputs(self.model, examples)
        self._given.state = stored
        model, last = self.model if stored is None else self._view, len(self.blocks)
        try:
            return states_at(model, self.blocks, inputs, [last], final_norm=self.checkpointed_norm)[last]
        finally:
            self._given.state = None

    def _norm(self) -> nn.Module:
        """The final norm, where passes end if blocks run under gradient checkpointing.

        Raises:
            InputError: The model has none.
        """
        name = norm_without_running(self.model, find_blocks(self.model)[0])
        if name is None:
            raise InputError(
                f"{type(self.model).__name__}: has no final norm: leave gradient_checkpointing out"
            )
        return self.model.get_submodule(name)

    @staticmethod
    def counted(examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Where a prediction counts ``[n, t-1]``, the ids there, and the ids that follow."""
        following = examples.labels[:, 1:]
        counts = following != IGNORED
        return counts, examples.input_ids[:, :-1][counts], following[counts]

    def backward(
        self,
        state: Float[Tensor, "n t d"],
        examples: Examples,
        total: float,
        objective: Objective | None = None,
    ) -> float:
        """Sum of the losses in nats; adds the gradient of that sum over ``total`` to the parameters.

        Args:
            state: What :meth:`states` returned.
            examples: The same rows.
            total: What the sum is divided by before it is differentiated.
            objective: From the logits ``[rows, v]`` of a chunk and its place among the counted tokens to one
                number a token; the next token's cross entropy if None.
        """
        counts, ids, following = self.counted(examples)
        if not bool(counts.any()):
            if self.lockstep and state.requires_grad:
                state.backward(torch.zeros_like(state))
            return 0.0

        def entropy(logits: Tensor, rows: slice) -> Tensor:
            return cross_entropies(logits, following[rows])

        where = counts.to(state.device)
        hidden = state.detach()[:, :-1][where]
        losses, slopes = self._tail.backward(hidden, ids, objective or entropy, total)
        if state.requires_grad:
            gradient = torch.zeros_like(state)
            gradient[:, :-1][where] = slopes
            state.backward(gradient)
        return float(losses.sum(dtype=torch.float64))

    @torch.no_grad()
    def losses(self, state: Float[Tensor, "n t d"], examples: Examples) -> Float[Tensor, " m"]:
        """The next token's cross entropy (nats, float32) at every token where it counts."""
        counts, ids, following = self.counted(examples)
        hidden = state[:, :-1][counts.to(state.device)]
        return self._tail.reduce(hidden, ids, lambda logits, rows: cross_entropies(logits, following[rows]))


def checkpoint_blocks(prepared: Prepared, found: Layout) -> None:
    """Have the blocks that autograd passes through compute their inner states again."""
    model = prepared.plain
    within = {id(module) for active in prepared.active for module in active.modules()}
    skipped = 0
    for name in found.blocks:
        block = model.get_submodule(name)
        trained = id(block) in within
        if not trained and prepared.recipe.kind == "tail":
            continue  # frozen, and nothing in front of it trains
        if not trained and any("drop" in n and v for n, v in vars(block).items() if isinstance(v, float)):
            skipped += 1  # in training mode the block would drop out by itself, though it is frozen
            continue
        prepared.checkpointed.append(block)
    if skipped:
        prepared.notes.append(f"{skipped} blocks with dropout of their own were not checkpointed")
    if prepared.checkpointed:
        switch_checkpointing(model, on=True)


def switch_checkpointing(model: Any, *, on: bool) -> None:
    """Gradient checkpointing of transformers, under its new name or its former one."""
    verb = "enable" if on else "disable"
    call = getattr(model, f"activation_checkpointing_{verb}", None)
    call = call or getattr(model, f"gradient_checkpointing_{verb}")
    call({"use_reentrant": False}) if on else call()
    # the embedding need not ask for a gradient, which would run what is frozen backwards
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
