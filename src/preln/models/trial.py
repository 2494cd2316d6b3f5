"""One block on one stream, run again and again: as it is, without some of its modules, on a larger stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from preln.models.roles import readers
from preln.models.structure import Trace, Tracer, hidden_of, is_norm

Call = tuple[tuple[Any, ...], dict[str, Any]]
Ends = list[nn.Module]


def replay(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Run a block again on another hidden state, with the masks and positions of a captured call."""
    args, kwargs = call
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "layer_past")}
    if args:
        return hidden_of(block(hidden, *args[1:], **kwargs))
    return hidden_of(block(**{**kwargs, "hidden_states": hidden}))


@contextmanager
def returning(modules: Sequence[nn.Module], *, noise: bool = False) -> Iterator[None]:
    """Let modules return zeros, or noise of unit size, in place of their first output."""

    def instead(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = hidden_of(output)
        generator = torch.Generator().manual_seed(1)
        other = torch.randn(first.shape, generator=generator).to(first) if noise else torch.zeros_like(first)
        if isinstance(output, Tensor):
            return other
        make = getattr(output, "_make", type(output))  # a named tuple takes its fields one by one
        return make([other, *output[1:]])

    handles = [module.register_forward_hook(instead) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Trial:
    """Traced runs of one block on a random stream.

    Attributes:
        x: The stream, unit-sized: no massive activation, no empty token, and far from the norms' eps.
        y: The block's output on it.
        trace: What its modules took and gave in that run.
        norms: Those of its modules that are norms, in order of execution.
    """

    def __init__(self, block: nn.Module, call: Call, width: int) -> None:
        self.block, self.call = block, call
        args, kwargs = call
        like = args[0] if args else kwargs["hidden_states"]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(like.shape, generator=generator).to(like)
        self.y, self.trace = self.run()
        self.norms = [m for m in dict.fromkeys(self.trace.order) if is_norm(m, width)]

    def run(self, *, factor: float = 1.0) -> tuple[Tensor, Trace]:
        """The block's output on ``factor * x``, and what its modules took and gave."""
        with Tracer([m for m in self.block.modules() if m is not self.block]) as trace:
            y = replay(self.block, self.call, factor * self.x)
        return y, trace

    def without(self, modules: Ends, *, factor: float = 1.0) -> tuple[Tensor, Trace]:
        """The same with zeros in place of what ``modules`` return."""
        with returning(modules):
            return self.run(factor=factor)

    def ends(self, branch: nn.Module | None, before: nn.Module | None, after: nn.Module | None) -> list[Ends]:
        """What to silence so that a branch is gone, likeliest first.

        The norm behind it; the branch; everything that reads its norm (a state-space layer beside attention,
        shared experts beside routed ones); its last layers (where the branch adds the stream by itself).
        """
        if branch is None:
            return []
        leaves = [
            m
            for m in dict.fromkeys(reversed(self.trace.order))
            if m in set(branch.modules()) and m not in self.norms and not any(True for _ in m.children())
            and any(True for _ in m.parameters())
        ]  # fmt: skip
        together = readers(before, self.trace, self.norms)
        choices = [*([[after]] if after is not None else []), [branch], together, *[[m] for m in leaves[:3]]]
        return [c for c in choices if c]
