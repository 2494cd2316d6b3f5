"""Where the parts that recipes speak of sit in a model, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from preln.base.errors import InputError
from preln.models import anatomy, find_blocks, is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Names of the parts of a causal model, valid in every copy of it.

    Attributes:
        blocks: Dotted names of the blocks, in order.
        final_norm: Name of the norm before the head, or None.
        head: Name of the head.
        tied: Whether the head shares its weight with the embedding.
        attention: For every block, the name of what mixes tokens; None where it is not known.
    """

    blocks: tuple[str, ...]
    final_norm: str | None
    head: str
    tied: bool
    attention: tuple[str | None, ...]

    def tail(self, count: int) -> list[str]:
        """Names of the last ``count`` blocks, the final norm and the head."""
        norm = [] if self.final_norm is None else [self.final_norm]
        return [*self.blocks[len(self.blocks) - count :], *norm, self.head]


def layout(model: PreTrainedModel) -> Layout:
    """Find the parts by running the model once; on the meta device, from its modules alone.

    Raises:
        InputError: The model has no head, or no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__}: has no language-model head: load a causal language model")
    if head.weight.is_meta:
        path, blocks = find_blocks(model)
        norm = norm_without_running(model, path)
        mixing: list[nn.Module | None] = [None] * len(blocks)
    else:
        found = anatomy(model)
        blocks = found.blocks
        norm = None if found.final_norm is None else names[id(found.final_norm)]
        mixing = [parts.attention for parts in found.block_parts]
    return Layout(
        tuple(names[id(block)] for block in blocks),
        norm,
        names[id(head)],
        # moving a model to the meta device parts what is shared: there the configuration says it
        is_tied(model) or (head.weight.is_meta and bool(model.config.get_text_config().tie_word_embeddings)),
        tuple(None if module is None else names[id(module)] for module in mixing),
    )


def norm_without_running(model: PreTrainedModel, path: str) -> str | None:
    """The last module outside the blocks whose parameters are all vectors of the model's width."""
    width = model.config.get_text_config().hidden_size
    candidates = [
        name
        for name, module in model.named_modules()
        if not name.startswith(f"{path}.")
        and (own := list(module.parameters(recurse=False)))
        and all(tuple(parameter.shape) == (width,) for parameter in own)
    ]
    return candidates[-1] if candidates else None


def linear_maps(model: PreTrainedModel, found: Layout) -> dict[str, nn.Module]:
    """Every linear map of the blocks, by full name."""
    return {
        f"{block}.{name}": module
        for block in found.blocks
        for name, module in model.get_submodule(block).named_modules()
        if is_linear(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` or GPT-2's transposed ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's ``Conv1D``, a linear map stored as ``[inputs, outputs]``."""
    return type(module).__name__ == "Conv1D"
