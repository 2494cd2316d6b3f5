"""Blocks of a running model as functions of their hidden state: capture of a call, and its replay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from preln.base.errors import InputError
from preln.models.placement import Call, replay
from preln.models.residual import Tokens, model_inputs, on_blocks
from preln.models.structure import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Map = Callable[[Tensor], Tensor]
_FUSED = ("flash", "flex", "paged")


def placement_of(found: Anatomy, index: int) -> str:
    """The placement of one block, also where the blocks of a model differ."""
    several = getattr(found, "placements", None) or found.evidence.get("placements")
    return several[index] if several else found.placement


def check_differentiable(model: PreTrainedModel, found: Anatomy) -> None:
    """Refuse models whose kernels are known to have no second derivative.

    Raises:
        InputError: Fused attention, or a compiled model.
    """
    kind = str(getattr(model.config.get_text_config(), "_attn_implementation", ""))
    if any(word in kind for word in _FUSED):
        raise InputError(
            f"attention implementation {kind!r} has no double backward: load the model with "
            'attn_implementation="eager"'
        )
    for module in (model, *found.blocks):
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{type(module).__name__}: compiled modules have no double backward: measure the model "
                "before compiling it"
            )


def hidden_input(call: Call) -> Tensor:
    """The hidden state that a captured call was given."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def capture_calls(
    model: PreTrainedModel, found: Anatomy, tokens: Tokens, *, check_stream: bool = False
) -> list[Call]:
    """The arguments with which every block is called on one sequence batch, from one forward pass.

    Args:
        model: The model.
        found: Its anatomy.
        tokens: One sequence batch, on the model's device.
        check_stream: Refuse a model that changes the hidden state between two blocks.

    Raises:
        InputError: A block runs never or twice, or the stream is changed between blocks.
    """
    calls: dict[int, Call] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index in calls:
                raise InputError(f"block {index}: runs more than once in a forward pass: not supported")
            calls[index] = (args, kwargs)

        return hook

    with ExitStack() as stack:
        if check_stream:
            stack.enter_context(on_blocks(found.blocks, lambda *_: None))
        for index, block in enumerate(found.blocks):
            stack.callback(block.register_forward_pre_hook(keep(index), with_kwargs=True).remove)
        model(**model_inputs(model, tokens))
    missing = [index for index in range(found.num_blocks) if index not in calls]
    if missing:
        raise InputError(f"block {missing[0]}: did not run in a forward pass: not supported")
    return [calls[index] for index in range(found.num_blocks)]


def run_block(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Replay on a copy of ``hidden`` with attention that can be differentiated twice.

    A copy, since some blocks add to their input in place, which the leaf of a graph does not allow.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return replay(block, call, hidden.clone())


def block_map(block: nn.Module, call: Call) -> Map:
    """The function from the block's hidden state to its output, everything else as in the call."""
    return lambda hidden: run_block(block, call, hidden)
