"""Blocks at the start that several variants of one model have in common, run once for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import find_blocks, hidden_of, view
from preln.models.through import StandIn, states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 32
# settings of a configuration that change nothing in front of the head of a shorter stack
_APART = ("_name_or_path", "architectures", "tie_word_embeddings", "use_cache", "transformers_version",
          "num_hidden_layers", "decoder_layers", "num_decoder_layers", "n_layers", "n_layer")  # fmt: skip


def shared_depth(models: Sequence[PreTrainedModel]) -> int:
    """How many blocks at the start are the same in all models, with everything in front of them.

    The same means: configuration (per-layer lists as far as they reach), weights and buffers of every module
    that runs up to there, to the last bit, and states of some tokens, to the last bit. Anything else counts
    as different, which costs time and never a result; so does a model whose blocks cannot be found.
    """
    try:
        return _shared_depth(models)
    except InputError:
        return 0


def _shared_depth(models: Sequence[PreTrainedModel]) -> int:
    stacks = [find_blocks(model)[1] for model in models]
    depth = min(map(len, stacks))
    for model, blocks in zip(models[1:], stacks[1:], strict=True):
        if not _same_modules(_before(models[0], stacks[0][0]), _before(model, blocks[0])):
            return 0
        same = [_same_modules([a], [b]) for a, b in zip(stacks[0], blocks, strict=False)]
        depth = min(depth, next((i for i, equal in enumerate(same) if not equal), depth))
        while depth and _settings(models[0], len(stacks[0]), depth) != _settings(model, len(blocks), depth):
            depth -= 1
    return _same_states(models, stacks, depth)


class Leading:
    """States behind the shared blocks, by the batch that they belong to.

    The first model that meets a batch runs it whole and leaves the state; the others begin behind it.
    """

    def __init__(self, depth: int, budget: int) -> None:
        """Share ``depth`` blocks, and keep at most ``budget`` bytes; batches beyond it are run whole."""
        self.depth, self.budget = depth, budget
        self.held, self.reused = 0, 0
        self._states: dict[bytes, Tensor] = {}
        self._model: Any = None
        self._last_shared: nn.Module | None = None
        self._given: Any = None
        self._rest: Any = None

    def begin(self, model: PreTrainedModel) -> None:
        """Turn to the next model."""
        self._model, self._given, self._rest = model, None, None
        if not self.depth:
            return
        blocks = find_blocks(model)[1]
        self._last_shared = blocks[self.depth - 1]
        if self._states:
            self._given = StandIn(model, blocks[0])
            self._rest = view(model, [self._given, *blocks[self.depth :]])

    def logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """The model's logits."""
        if self._last_shared is None:
            return self._model(ids, use_cache=False).logits
        key = hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.cpu().numpy().tobytes()).digest()
        if self._rest is not None and key in self._states:
            self.reused += 1
            # a copy, for some blocks add to their input in place
            self._given.state = self._states[key].to(ids.device, copy=True)
            try:
                return self._rest(ids, use_cache=False).logits
            finally:
                self._given.state = None
        kept: list[Tensor] = []
        hook = self._last_shared.register_forward_hook(
            lambda _, __, output: kept.append(hidden_of(output).detach().to("cpu", copy=True))
        )
        try:
            found = self._model(ids, use_cache=False).logits
        finally:
            hook.remove()
        size = kept[0].numel() * kept[0].element_size()
        if key not in self._states and self.held + size <= self.budget:
            self._states[key] = kept[0]
            self.held += size
        return found


def _before(model: PreTrainedModel, block: nn.Module) -> list[nn.Module]:
    """The modules without children that run before the first block, in order."""
    seen: list[nn.Module] = []
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_pre_hook(lambda m, _: seen.append(m)) for m in leaves]
    first = next((m for m in block.modules() if m in leaves), block)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    inside = set(block.modules())
    end = next((i for i, m in enumerate(seen) if m is first or m in inside), len(seen))
    return seen[:end]


def _same_modules(first: Sequence[nn.Module], second: Sequence[nn.Module]) -> bool:
    """Whether modules have the same classes, weights and buffers."""
    if [type(m) for m in first] != [type(m) for m in second]:
        return False
    for one, other in zip(first, second, strict=True):
        if [type(m) for m in one.modules()] != [type(m) for m in other.modules()]:
            return False
        ours, theirs = _tensors(one), _tensors(other)
        if ours.keys() != theirs.keys():
            return False
        for name, tensor in ours.items():
            if tensor is not theirs[name] and not (
                tensor.dtype == theirs[name].dtype
                and tensor.device == theirs[name].device
                and torch.equal(tensor, theirs[name])
            ):
                return False
    return True


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _settings(model: PreTrainedModel, blocks: int, depth: int) -> dict[str, Any]:
    """A configuration as far as it concerns the first ``depth`` blocks."""
    text = model.config.get_text_config()
    kept = {k: v for k, v in text.to_dict().items() if k not in _APART}
    kept["attention"] = getattr(text, "_attn_implementation", None)
    return {
        name: value[:depth] if isinstance(value, list | tuple) and len(value) == blocks else value
        for name, value in kept.items()
    }


@torch.no_grad()
def _same_states(models: Sequence[PreTrainedModel], stacks: Sequence[list[nn.Module]], depth: int) -> int:
    """The largest depth up to ``depth`` at which all models have the same states on a few tokens."""
    if not depth:
        return 0
    embedding: Any = models[0].get_input_embeddings()
    ids = torch.randint(0, embedding.weight.shape[0], (2, _PROBE), generator=torch.Generator().manual_seed(0))
    found = [
        states_at(
            model,
            blocks,
            {"input_ids": ids.to(model.device), "use_cache": False},
            range(depth + 1),
        )
        for model, blocks in zip(models, stacks, strict=True)
    ]
    for level in range(depth + 1):
        if not all(torch.equal(found[0][level], other[level]) for other in found[1:]):
            return max(level - 1, 0)
    return depth
