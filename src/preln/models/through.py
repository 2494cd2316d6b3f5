"""The first end of a pass: tokens to x[L], and a stand-in for blocks whose state is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.placement import Call
from preln.models.residual import Tokens, model_inputs
from preln.models.structure import hidden_of
from preln.models.surgery import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stop(Exception):
    """What was wanted of a pass is there."""


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
        raise Stop

    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(keep(index), with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(stop))
        model(**model_inputs(model, tokens))
    except Stop:
        return found[0], calls
    finally:
        for handle in handles:
            handle.remove()
    raise InputError(f"block {len(blocks) - 1}: did not run in a pass: not supported")


class StandIn(Stored):
    """Returns a stored state in the form in which the model's blocks return theirs."""

    def __init__(self, model: PreTrainedModel, block: nn.Module) -> None:
        super().__init__()
        self._others = 0
        self._tuple = False
        for name, value in vars(block).items():  # a model may read off a block what masks it needs
            if not (name.startswith("_") or callable(value) or hasattr(self, name)):
                setattr(self, name, value)

        def look(_: nn.Module, __: Any, output: Any) -> None:
            self._tuple = not isinstance(output, Tensor)
            self._others = len(output) - 1 if self._tuple else 0
            raise Stop

        device = next(model.get_input_embeddings().parameters()).device
        handle = block.register_forward_hook(look)
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()

    def forward(self, *_: Any, **__: Any) -> Any:
        """The stored state, alone or in a tuple."""
        return (self.state, *[None] * self._others) if self._tuple else self.state


def states_at(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: Mapping[str, Any],
    depths: Iterable[int],
    *,
    final_norm: nn.Module | None = None,
) -> dict[int, Float[Tensor, "b t d"]]:
    """x[l] for every depth l asked for, with its graph, from one pass that ends at the deepest.

    Args:
        model: Takes ``inputs``; may be a wrapper around the model that holds the blocks.
        blocks: The blocks, in order; x[L] is the output of the last, before the final norm.
        inputs: Keyword arguments of the model: token ids, masks, positions.
        depths: Each from 0 to L.
        final_norm: The norm behind the last block, where blocks are run under gradient checkpointing: there
            a pass may not end inside a block's call, and x[L] is taken in front of the norm.

    Raises:
        InputError: A depth out of range, or a block that does not run.
    """
    wanted = sorted(set(depths))
    last = len(blocks)
    if not wanted or not 0 <= wanted[0] <= wanted[-1] <= last:
        raise InputError(f"depths {wanted}: give at least one, each from 0 to {last}")
    found: dict[int, Tensor] = {}

    def before(depth: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(depth, args[0] if args else kwargs["hidden_states"])

        return hook

    def keep(depth: int, hidden: Tensor) -> None:
        # some blocks add to their input in place: what is still needed afterwards is copied
        found[depth] = hidden if depth == wanted[-1] else hidden.clone()
        if depth == wanted[-1]:
            raise Stop

    ends = [*blocks, *([] if final_norm is None else [final_norm])]
    handles = [
        module.register_forward_pre_hook(before(depth), with_kwargs=True)
        for depth, module in enumerate(ends)
        if depth in wanted
    ]
    if wanted[-1] == last and final_norm is None:
        handles.append(blocks[-1].register_forward_hook(lambda _, __, output: keep(last, hidden_of(output))))
    try:
        model(**inputs)
    except Stop:
        return found
    finally:
        for handle in handles:
            handle.remove()
    raise InputError(f"block {wanted[-1] - 1}: did not run in a pass: not supported")
