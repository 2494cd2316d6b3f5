"""Half-precision blocks in float32 for a while, and back to the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError

HALF = (torch.float16, torch.bfloat16)
_PLAIN = (*HALF, torch.float32, torch.float64)


def check_plain_weights(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse weights that are codes of numbers instead of numbers.

    Raises:
        InputError: Quantised weights, naming the first.
    """
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if parameter.dtype not in _PLAIN:
                raise InputError(
                    f"block {index}: the weight {name!r} is stored as {parameter.dtype}: quantised weights "
                    "have no second derivative here: load the model in a floating-point dtype"
                )
    if getattr(model, "is_quantized", False):
        raise InputError(
            f"{type(model).__name__}: its weights are quantised, and quantised layers have no second "
            "derivative here: load the model in a floating-point dtype"
        )


def widen(value: Any) -> Any:
    """The same nest of tuples, lists and dicts with its half-precision tensors in float32.

    An additive mask holds the lowest number of its dtype where nothing may be seen; in float32 it becomes the
    lowest number of float32, which no score outweighs either.
    """
    if isinstance(value, Tensor):
        if value.dtype not in HALF:
            return value
        lowest = value <= torch.finfo(value.dtype).min
        return torch.where(lowest, torch.finfo(torch.float32).min, value.float())
    if type(value) in (tuple, list):
        return type(value)(widen(item) for item in value)
    if type(value) is dict:
        return {key: widen(item) for key, item in value.items()}
    return value


@contextmanager
def widened(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters and buffers of the blocks in float32 where they are in half precision.

    The original tensors are kept aside, so that on leaving, errors included, they are back bit by bit, and
    parameters that were in float32 among half-precision ones stay so. The memory is that of the blocks three
    times over, in half-precision units.
    """
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for block in blocks:
            for parameter in block.parameters():
                if parameter.dtype in HALF:
                    parameters.append((parameter, parameter.data))
                    parameter.data = parameter.data.float()
            for module in block.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.dtype in HALF:
                        buffers.append((module, name, buffer))
                        module._buffers[name] = buffer.float()
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
