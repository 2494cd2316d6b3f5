"""Where a causal model keeps its blocks, norms, branches and head, found without a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parts:
    """The two branches of a block and the norms in front of them; None where the block shows none."""

    attention: nn.Module | None = None
    mlp: nn.Module | None = None
    attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None


@dataclass
class Anatomy:
    """What :func:`preln.models.anatomy` found.

    Attributes:
        path: Dotted name of the list of blocks inside the model.
        blocks: The blocks, in order.
        final_norm: The norm between the last block and the head, or None.
        head: The module that gives logits.
        embedding: The token embedding.
        placement: ``pre-ln``, ``parallel``, ``post-ln``, ``sandwich``, ``norm-after-branch`` or ``unknown``,
            as measured.
        evidence: The measurements that the placement rests on, by name.
    """

    path: str
    blocks: list[nn.Module]
    final_norm: nn.Module | None
    head: nn.Module
    embedding: nn.Module
    placement: str = "unknown"
    evidence: dict[str, Any] = field(default_factory=dict)
    block_parts: list[Parts] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    def parts(self, index: int) -> Parts:
        """The branches and norms of block ``index``, counted from 0."""
        return self.block_parts[index]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: itself, or the first entry of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Dotted path and modules of the decoder blocks.

    They are the ``ModuleList`` that has as many entries as the configuration has hidden layers and holds
    the most parameters.

    Raises:
        InputError: No list fits, as in models whose blocks are not a list.
    """
    expected = model.config.get_text_config().num_hidden_layers
    candidates = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    if not candidates:
        kind = type(model).__name__
        raise InputError(f"{kind}: no list of {expected} blocks found: this architecture is not supported")
    # of two lists of equal weight (a list inside a list of one block) the outer one comes first
    _, name, blocks = max(candidates, key=lambda c: (c[0], -len(c[1])))
    return name, list(blocks)


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a leaf module behaves as a norm over ``width`` channels: its output ignores its input's scale.

    Measured on a random vector, not read off the name. A constant output does not count.
    """
    if any(True for _ in module.children()) or isinstance(module, nn.Dropout | nn.Identity | nn.Linear):
        return False
    if any(p.ndim > 1 or p.numel() != width for p in module.parameters(recurse=False)):
        return False
    parameter = next(module.parameters(), None)
    reference = parameter if parameter is not None else torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, width, generator=generator).to(reference.device, reference.dtype) * 8.0
    try:
        with torch.no_grad():
            once, scaled = module(x), module(4.0 * x)
    except Exception:  # a leaf that takes other inputs (rotary tables, caches) is no norm
        return False
    if not isinstance(once, Tensor) or once.shape != x.shape:
        return False
    spread = (once[0] - once[1]).abs().max()
    bias = getattr(module, "bias", None)
    centred = once if not isinstance(bias, Tensor) else once - bias
    change = (scaled - once).abs().max()
    return bool(spread > 0) and bool(change <= 0.02 * centred.abs().max())


def _child(block: nn.Module, words: tuple[str, ...], reject: tuple[str, ...]) -> nn.Module | None:
    """The first direct child with weights whose name holds one of ``words`` and none of ``reject``."""
    for name, module in block.named_children():
        lowered = name.lower()
        named = any(word in lowered for word in words) and not any(word in lowered for word in reject)
        if named and any(True for _ in module.parameters()):
            return module
    return None


def branches(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The attention and MLP modules of a block (for an MLP spread over the block, its last linear map)."""
    reject = ("norm", "ln_", "layernorm")
    attention = _child(block, ("attn", "attention", "mixer"), reject)
    mlp = _child(block, ("mlp", "ffn", "feed_forward", "feedforward", "moe", "output"), reject)
    if mlp is None:
        linear = [m for m in block.children() if isinstance(m, nn.Linear)]
        mlp = linear[-1] if linear else None
    return attention, mlp


@dataclass
class Trace:
    """What one run saw: each watched module's first input and its output, in order of execution."""

    order: list[nn.Module] = field(default_factory=list)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


class Tracer:
    """Context manager that hooks modules and fills a :class:`Trace`; the hooks are gone afterwards."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """Watch ``modules``."""
        self.modules = modules
        self.trace = Trace()
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        """Attach the hooks."""
        for module in self.modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        return self.trace

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        if isinstance(hidden, Tensor):
            self.trace.inputs.setdefault(module, hidden)
        self.trace.calls.setdefault(module, (args, kwargs))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor | tuple):
            self.trace.order.append(module)
            self.trace.outputs.setdefault(module, hidden_of(output))
