"""The other end of a pass: everything behind the blocks, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.residual import Tokens
from preln.models.roles import same
from preln.models.structure import find_blocks
from preln.models.surgery import view
from preln.models.through import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# logits held at once: 2^25 numbers are 128 MiB in float32
_LOGITS = 2**25
_LEAST = 16


class Tail:
    """Final norm, head, and whatever the architecture does to its logits, for any state x[L].

    The model itself runs them, with a stand-in that returns the state where its blocks were, so scaled or
    capped logits are right. What follows the blocks acts on every token by itself (checked on the first
    tokens that come), so tokens go through as sequences of length one, as many at a time as fit: no mask and
    no position plays a part, padding and last tokens cost nothing, and however long the batch, the logits of
    one chunk exist at a time (and their logarithms of probabilities, where losses are asked for). Where a
    chain of modules (a norm, a linear map) gives the same bits on those tokens and on others, the chain is
    called from then on, without embedding and masks that lead nowhere.

    Make it where the model is already in evaluation mode.
    """

    def __init__(
        self, model: PreTrainedModel, *, rows: int | None = None, block: nn.Module | None = None
    ) -> None:
        """Stand behind the blocks of a model.

        Args:
            model: A causal model.
            rows: Tokens in a chunk (default: by the size of the vocabulary).
            block: Its first block, where the caller knows it already.
        """
        self._given = StandIn(model, block or find_blocks(model)[1][0])
        self._view = view(model, [self._given])
        self._decoder: Any = self._view.get_decoder()
        self.rows = rows or max(_LEAST, _LOGITS // model.config.get_text_config().vocab_size)
        self._kind, self._checked = type(model).__name__, False
        self._chain: list[nn.Module] | None = None

    def _run(self, module: Any, hidden: Tensor, ids: Tensor) -> Any:
        self._given.state = hidden
        try:
            return module(input_ids=ids, use_cache=False)
        finally:
            self._given.state = None

    def logits(self, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
        """The logits of n tokens, all at once; ``ids`` are the tokens at which the states are."""
        if self._chain is not None:
            return _along(self._chain, hidden)
        return self._run(self._view, hidden[:, None], ids[:, None]).logits[:, 0]

    def normed(self, hidden: Float[Tensor, "n d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The states behind the final norm: transformers' last hidden state."""
        return self._run(self._decoder, hidden[:, None], ids[:, None])[0][:, 0]

    def reduce(
        self,
        hidden: Float[Tensor, "n d"],
        ids: Int[Tensor, " n"],
        function: Callable[[Tensor, slice], Tensor],
    ) -> Tensor:
        """``function(logits, rows)`` of one chunk after the other, joined along the first axis.

        Raises:
            InputError: What follows the blocks mixes tokens.
        """
        self._check(hidden, ids)
        parts = []
        for start in range(0, len(hidden), self.rows):
            rows = slice(start, start + self.rows)
            parts.append(function(self.logits(hidden[rows], ids[rows]), rows))
        return torch.cat(parts)

    @torch.no_grad()
    def _check(self, hidden: Tensor, ids: Tensor) -> None:
        """Look at the first tokens: are they mapped one by one, and by a mere chain of modules?"""
        few = min(3, len(hidden))
        if self._checked or few < 2:
            return
        self._checked = True
        x, ids = hidden[:few], ids[:few]
        together, chain = self._traced(x, ids)
        if not bool(torch.isfinite(together).all()):
            return
        if not same(self.logits(x, ids), together):
            raise InputError(f"{self._kind}: what follows its blocks mixes tokens: not supported")
        other = (x.flip(-1) - 3.0 * x).contiguous()
        try:
            found = [_along(chain, each[None])[0] for each in (x, other)]
        except Exception:  # whatever a module raises that takes more than a hidden state
            return
        if torch.equal(found[0], together) and torch.equal(found[1], self._traced(other, ids)[0]):
            self._chain = chain

    def _traced(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, list[nn.Module]]:
        """Logits of a few tokens as one sequence, and the modules without children behind the blocks."""
        chain: list[nn.Module] = []
        handles = [self._given.register_forward_hook(lambda *_: chain.clear())]
        for module in self._view.modules():
            if module is not self._given and not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(lambda m, *_: chain.append(m)))
        try:
            return self._run(self._view, hidden[None], ids[None]).logits[0], chain
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _predicting(state: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """States and ids of the tokens whose next one counts, and those next ones."""
        counts = tokens.targets
        hidden = state[:, :-1][counts.to(state.device)]
        return hidden, tokens.ids[:, :-1][counts], tokens.ids[:, 1:][counts]

    def _spread(self, losses: Tensor, tokens: Tokens) -> Tensor:
        counts = tokens.targets.to(losses.device)
        return torch.zeros(counts.shape, dtype=losses.dtype, device=losses.device).masked_scatter(
            counts, losses
        )

    def losses(self, state: Float[Tensor, "b t d"], tokens: Tokens) -> Float[Tensor, "b t-1"]:
        """Next-token losses (nats, float32) from x[L]; 0 where a target does not count."""
        hidden, ids, following = self._predicting(state, tokens)
        found = self.reduce(hidden, ids, lambda logits, rows: cross_entropies(logits, following[rows]))
        return self._spread(found, tokens)

    def losses_and_gradient(
        self, state: Float[Tensor, "b t d"], tokens: Tokens, total: float
    ) -> tuple[Float[Tensor, "b t-1"], Float[Tensor, "b t d"]]:
        """The losses, and the gradient of their sum over ``total`` with respect to the state.

        One chunk's graph exists at a time. Continue with ``state.backward(gradient)``.
        """
        hidden, ids, following = self._predicting(state.detach(), tokens)
        found, slopes = self.backward(
            hidden, ids, lambda logits, rows: cross_entropies(logits, following[rows]), total
        )
        gradient = torch.zeros_like(state)
        gradient[:, :-1][tokens.targets.to(state.device)] = slopes
        return self._spread(found, tokens), gradient

    def backward(
        self,
        hidden: Float[Tensor, "n d"],
        ids: Int[Tensor, " n"],
        objective: Callable[[Tensor, slice], Tensor],
        total: float = 1.0,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """Values of ``objective(logits, rows)`` of every token, and the gradient of their sum over ``total``.

        One chunk's graph exists at a time. Parameters of norm and head that require a gradient get theirs.

        Args:
            hidden: States behind the last block, without a graph.
            ids: The tokens at which the states are.
            objective: From the logits ``[rows, v]`` of a chunk to one number a token.
            total: What the gradient is divided by.

        Returns:
            The values, and the gradient with respect to ``hidden``.
        """
        self._check(hidden, ids)
        slopes, values = torch.empty_like(hidden), []
        for start in range(0, len(hidden), self.rows):
            rows = slice(start, start + self.rows)
            with torch.enable_grad():
                leaf = hidden[rows].clone().requires_grad_(True)
                each = objective(self.logits(leaf, ids[rows]), rows)
                (each.sum() / total).backward()
            slopes[rows] = leaf.grad if leaf.grad is not None else 0.0
            values.append(each.detach())
        return torch.cat(values), slopes


def _along(chain: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    for module in chain:
        hidden = module(hidden)
    return hidden


def cross_entropies(logits: Float[Tensor, "n v"], following: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``-log softmax(logits)[following]`` in float32, as :func:`preln.models.losses_from_logits` does."""
    return F.cross_entropy(logits.float(), following.to(logits.device), reduction="none")
