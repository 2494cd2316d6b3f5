"""The two ends of a pass apart: blocks without the head, and everything behind the blocks, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.placement import Call
from preln.models.residual import Tokens, model_inputs
from preln.models.roles import same
from preln.models.structure import find_blocks, hidden_of
from preln.models.surgery import Stored, view

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# logits held at once: 2^25 numbers are 128 MiB in float32
_LOGITS = 2**25
_LEAST = 16


class _Stop(Exception):
    """The last block has returned."""


def _without_hidden(call: Call, hidden: Tensor) -> Call:
    """A call that does not keep its hidden state alive; :func:`preln.models.replay` puts another there."""
    args, kwargs = call
    if args:
        return (None, *args[1:]), kwargs
    return args, {name: None if value is hidden else value for name, value in kwargs.items()}


def run_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tokens
) -> tuple[Float[Tensor, "b t d"], list[Call]]:
    """x[L], and the arguments with which every block was called, from a pass that ends before the final norm.

    With the calls, any block can be run again on another hidden state (:func:`preln.models.replay`), with the
    masks, positions and rotary tables of this pass, which are thus made once.

    Args:
        model: A causal model.
        blocks: Its blocks.
        tokens: One sequence batch, on the model's device.

    Raises:
        InputError: A block runs twice or never, or carries a second hidden state beside the stream.
    """
    calls: list[Call] = []
    beside: list[Tensor] = []
    found: list[Tensor] = []
    handles: list[Any] = []

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index != len(calls):
                raise InputError(f"block {index}: does not run once, in its place, in a pass: not supported")
            hidden = args[0] if args else kwargs["hidden_states"]
            others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not hidden]
            others = [v for v in others if v.is_floating_point() and v.shape == hidden.shape]
            if index == 0:
                beside.extend(others)
            elif len(others) != len(beside) or not all(
                a is b or torch.equal(a, b) for a, b in zip(others, beside, strict=True)
            ):
                raise InputError(f"block {index}: carries a second hidden state: not supported")
            calls.append(_without_hidden((args, kwargs), hidden))

        return hook

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        found.append(hidden_of(output))
        raise _Stop

    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(keep(index), with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(stop))
        model(**model_inputs(model, tokens))
    except _Stop:
        return found[0], calls
    finally:
        for handle in handles:
            handle.remove()
    raise InputError(f"block {len(blocks) - 1}: did not run in a pass: not supported")


class _StandIn(Stored):
    """Returns a stored state in the form in which the model's blocks return theirs."""

    def __init__(self, model: PreTrainedModel, block: nn.Module) -> None:
        super().__init__()
        self._others = 0
        self._tuple = False

        def look(_: nn.Module, __: Any, output: Any) -> None:
            self._tuple = not isinstance(output, Tensor)
            self._others = len(output) - 1 if self._tuple else 0
            raise _Stop

        device = next(model.get_input_embeddings().parameters()).device
        handle = block.register_forward_hook(look)
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()

    def forward(self, *_: Any, **__: Any) -> Any:
        """The stored state, alone or in a tuple."""
        return (self.state, *[None] * self._others) if self._tuple else self.state


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
        self._given = _StandIn(model, block or find_blocks(model)[1][0])
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
        slopes = torch.empty_like(hidden)
        found = []
        self._check(hidden, ids)
        for start in range(0, len(hidden), self.rows):
            rows = slice(start, start + self.rows)
            with torch.enable_grad():
                leaf = hidden[rows].clone().requires_grad_(True)
                losses = cross_entropies(self.logits(leaf, ids[rows]), following[rows])
                (slopes[rows],) = torch.autograd.grad(losses.sum() / total, leaf)
            found.append(losses.detach())
        gradient = torch.zeros_like(state)
        gradient[:, :-1][tokens.targets.to(state.device)] = slopes
        return self._spread(torch.cat(found), tokens), gradient


def _along(chain: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    for module in chain:
        hidden = module(hidden)
    return hidden


def cross_entropies(logits: Float[Tensor, "n v"], following: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``-log softmax(logits)[following]`` in float32, as :func:`preln.models.losses_from_logits` does."""
    return F.cross_entropy(logits.float(), following.to(logits.device), reduction="none")
