"""Cutting blocks: a view that shares every weight, and a new plain model with its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.structure import depth, find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# lists in a configuration that hold indices of blocks, not one entry a block
_INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers")
# how many of the first blocks are dense, in models whose others hold experts
_LEADING = ("first_k_dense_replace", "num_dense_layers")
# settings that hold the depth; the BART family has it twice
_DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")
# where attention modules keep the place of their block, which the key-value cache indexes by
_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")


def check_drop(drop: Iterable[int], num_blocks: int) -> list[int]:
    """The indices to remove, sorted, once they are known to make sense.

    Raises:
        InputError: Nothing to remove, an index out of range or twice, or no block would remain.
    """
    chosen = list(drop)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"block {index!r}: block indices are whole numbers counted from 0")
        if not 0 <= index < num_blocks:
            raise InputError(f"block {index} is out of range: this model has blocks 0 to {num_blocks - 1}")
    if len(set(chosen)) != len(chosen):
        twice = next(i for i in chosen if chosen.count(i) > 1)
        raise InputError(f"block {twice} is named twice: name each block to remove once")
    if not chosen:
        raise InputError("no block to remove: name at least one")
    if len(chosen) == num_blocks:
        raise InputError(f"all {num_blocks} blocks would be removed: keep at least one")
    return sorted(chosen)


def _shallow(module: nn.Module) -> nn.Module:
    """A module object of its own, with its own tables of children and hooks, sharing every tensor."""
    clone = copy.copy(module)
    for name, value in list(clone.__dict__.items()):
        if isinstance(value, dict) and ((name.startswith("_") and "hooks" in name) or name == "_modules"):
            clone.__dict__[name] = value.copy()
    return clone


def cut_config(config: Any, indices: Sequence[int]) -> None:
    """Adapt a configuration, in place, to a stack made of the former blocks ``indices``."""
    text = config.get_text_config()
    former = depth(config)
    for name in _LEADING:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, sum(old < value for old in indices))
    for name, value in list(vars(text).items()):
        if name in _INDEX_LISTS and isinstance(value, list):
            setattr(text, name, [new for new, old in enumerate(indices) if old in value])
        elif isinstance(value, list | tuple) and len(value) == former and not name.startswith("_"):
            setattr(text, name, type(value)(value[i] for i in indices))
    for name in _DEPTHS:
        if getattr(text, name, None) == former:
            setattr(text, name, len(indices))


class Stored(nn.Module):
    """Stands where blocks were, in a :func:`view`: returns a stored hidden state whatever comes in."""

    def __init__(self, state: Tensor | None = None) -> None:
        super().__init__()
        self.state = state

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        """The stored state."""
        return self.state


def view(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> PreTrainedModel:
    """A model object that runs ``blocks`` instead of its own and shares every weight with ``model``.

    Embedding, positions, masks, final norm, head and whatever the architecture does to its logits stay as
    they are. A module that is none of the model's blocks may stand in the list; it takes the per-layer
    settings of block 0. Call the view with ``use_cache=False``: its blocks keep their former cache indices.

    Args:
        model: A causal model whose blocks :func:`preln.models.structure.find_blocks` finds.
        blocks: What to run, in this order; at least one.
    """
    path, own = find_blocks(model)
    places = {id(block): i for i, block in enumerate(own)}
    memo: dict[int, Any] = {}
    root: Any = _shallow(model)
    walked = [root]
    *parents, last = path.split(".")
    for name in parents:
        child: Any = _shallow(getattr(walked[-1], name))
        walked[-1]._modules[name] = child
        walked.append(child)
    walked[-1]._modules[last] = nn.ModuleList(blocks)
    configs: list[Any] = []
    for module in walked:
        if "config" in module.__dict__:
            module.config = copy.deepcopy(module.config, memo)
            if not any(module.config.get_text_config() is c.get_text_config() for c in configs):
                configs.append(module.config)
    for config in configs:
        cut_config(config, [places.get(id(block), 0) for block in blocks])
    return root


def drop_blocks(model: PreTrainedModel, drop: Iterable[int]) -> PreTrainedModel:
    """A new plain model without the blocks ``drop``, with weights of its own; ``model`` is untouched.

    Indices inside the blocks are renumbered from 0 (the key-value cache is addressed by them), per-layer
    lists of the configuration are cut, a tied head stays tied, the generation settings are kept.

    Raises:
        InputError: See :func:`check_drop`.
    """
    _, blocks = find_blocks(model)
    gone = set(check_drop(drop, len(blocks)))
    kept = [block for i, block in enumerate(blocks) if i not in gone]
    with torch.no_grad():
        small = copy.deepcopy(view(model, kept))
    for index, block in enumerate(find_blocks(small)[1]):
        for module in block.modules():
            for name in _INDEX_ATTRIBUTES:
                if isinstance(module.__dict__.get(name), int):
                    setattr(module, name, index)
    return small


def is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding are one and the same tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie_head(model: PreTrainedModel) -> PreTrainedModel:
    """Give the head a copy of the embedding's weight as its own, in place; returns ``model``.

    Training "the head" of a tied model would train the embedding too. Merely setting
    ``tie_word_embeddings`` to False leaves a random head on the next load; here the weight is cloned first.
    """
    head: Any = model.get_output_embeddings()
    if is_tied(model):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    return model
