"""Where in a model numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.models.structure import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, inputs: Mapping[str, Any] | Callable[[], object]) -> str | None:
    """The first module, in the order of one forward pass, that returns NaN or infinite numbers.

    Args:
        model: A causal model; left as it is.
        inputs: Keyword arguments of the model: token ids ``[n, T]`` and masks; or what runs it, as a whole or
            in part.

    Returns:
        Such as ``block 2, mlp.down_proj`` (blocks counted from 0), or the module's own name outside the
        blocks; None where all is finite.
    """
    path, blocks = find_blocks(model)
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else [output]
            tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
            if not found and not all(bool(torch.isfinite(part).all()) for part in tensors):
                found.append(name)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None or module in list(blocks):
                handle = module.register_forward_hook(look(_told(name, path)))
                stack.callback(handle.remove)
        inputs() if callable(inputs) else model(**inputs)
    return found[0] if found else None


def _told(name: str, path: str) -> str:
    """A module's name for people.

    >>> _told("model.layers.2.mlp.down_proj", "model.layers")
    'block 2, mlp.down_proj'
    """
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"block {number}, {rest}" if rest else f"block {number}"
