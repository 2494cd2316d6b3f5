"""Where a causal model keeps its blocks, norms, branches and head, found without a list of architectures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parts:
    """The two branches of a block, the norms in front of them and behind them; None where there is none.

    Attributes:
        attention: What mixes tokens: attention, or a state-space, recurrent or convolutional layer.
        mlp: What acts on every token alone (of an MLP spread over the block, its last linear map).
        attention_norm: The norm whose output the attention reads; None in Post-LN, whose norms stand behind.
        mlp_norm: The norm whose output the MLP reads; likewise.
        attention_norm_after: The norm that takes the attention's output (sandwich, norm-after-branch), or
            that takes x plus it (Post-LN).
        mlp_norm_after: Likewise behind the MLP.
    """

    attention: nn.Module | None = None
    mlp: nn.Module | None = None
    attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None
    attention_norm_after: nn.Module | None = None
    mlp_norm_after: nn.Module | None = None


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
            as measured; ``unknown`` also where the blocks differ.
        evidence: The measurements that the placement rests on, by name.
        block_parts: The parts of every block.
        placements: The measured placement of every block.
    """

    path: str
    blocks: list[nn.Module]
    final_norm: nn.Module | None
    head: nn.Module
    embedding: nn.Module
    placement: str = "unknown"
    evidence: dict[str, Any] = field(default_factory=dict)
    block_parts: list[Parts] = field(default_factory=list)
    placements: list[str] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    def parts(self, index: int) -> Parts:
        """The branches and norms of block ``index``, counted from 0."""
        return self.block_parts[index]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: itself, or the first entry of a tuple or list."""
    return output if isinstance(output, Tensor) else output[0]


def depth(config: Any) -> int | None:
    """Number of hidden layers of the decoder that a configuration describes; None if it does not say.

    In the BART family ``num_hidden_layers`` counts the encoder's, also where only the decoder is built.
    """
    text = config.get_text_config()
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((count for name in names if (count := getattr(text, name, None))), None)


def find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Dotted path and modules of the decoder blocks.

    They are the ``ModuleList`` that has as many entries as the configuration has hidden layers, lies in the
    model's text decoder if any such list does, lies least deep, and holds the most parameters.

    Raises:
        InputError: No list fits, as in models whose blocks are not a list.
    """
    expected, decoder = depth(model.config), model.get_decoder()
    within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    candidates = [
        (id(module) in within, -name.count("."), sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    if not candidates:
        count = "layers that its configuration counts" if expected is None else f"{expected} blocks"
        raise InputError(
            f"{type(model).__name__}: no list of {count} found: this architecture is not supported"
        )
    *_, name, blocks = max(candidates, key=lambda c: c[:3])
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


@dataclass
class Trace:
    """What one run saw: each watched module's first input and its output, in order of execution."""

    order: list[nn.Module] = field(default_factory=list)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    entered: Counter[nn.Module] = field(default_factory=Counter)


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
        named = kwargs.get("hidden_states", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))
        hidden = args[0] if args else named
        if isinstance(hidden, Tensor):
            # copies, since some blocks add to a tensor in place after it was handed over
            self.trace.inputs.setdefault(module, hidden.detach().clone())
        self.trace.calls.setdefault(module, (args, kwargs))
        self.trace.entered[module] += 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, Tensor):
            self.trace.order.append(module)
            self.trace.outputs.setdefault(module, output.detach().clone())
