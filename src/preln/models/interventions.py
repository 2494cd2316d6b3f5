"""The branches of a block as functions of one tensor, by intervention: no block's code is known here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.maps import Map, hidden_input, run_block
from preln.models.placement import Call
from preln.models.structure import Parts, Tracer


class BranchError(InputError):
    """A block's branch is not where its placement says."""


@dataclass(frozen=True)
class Branch:
    """One branch of a block: where it begins and ends, and the norms around it.

    Attributes:
        site: ``attention``, ``mlp``, or ``block`` for both branches behind one shared norm.
        begin: The module at which the branch begins.
        at: Whether the branch begins at that module's ``input`` or ``output``.
        end: The module whose input the branch's result arrives at; None for the block's output.
        held: A module whose input stays what it was, so that the other branch does not move; or None.
        before: The norm in front of the branch, or None.
        after: The norm behind it, or None.
    """

    site: str
    begin: nn.Module
    at: Literal["input", "output"]
    end: nn.Module | None = None
    held: nn.Module | None = None
    before: nn.Module | None = None
    after: nn.Module | None = None

    @property
    def norms(self) -> list[nn.Module]:
        """The norms around the branch that there are."""
        return [norm for norm in (self.before, self.after) if norm is not None]


def _entrance(block: nn.Module, mlp: nn.Module) -> nn.Module:
    """The module that takes the MLP's input: the first linear map of an MLP spread over the block."""
    linears = [m for m in block.children() if isinstance(m, nn.Linear)]
    return linears[0] if any(mlp is m for m in linears) else mlp


def branches_of(block: nn.Module, parts: Parts, placement: str) -> list[Branch]:
    """The branches of a block of known placement; empty where their ends are not all known.

    In the order in which they act. Behind one shared norm (``parallel``) a third, of site ``block``, is both
    branches together.
    """
    one, two = parts.attention_norm, parts.mlp_norm
    ends = parts.attention_norm_after, parts.mlp_norm_after
    attention, mlp = parts.attention, parts.mlp
    if placement == "pre-ln" and one is not None and two is not None and one is not two:
        return [
            Branch("attention", one, "output", end=two, before=one),
            Branch("mlp", two, "output", before=two),
        ]
    if placement == "parallel" and one is not None and two is not None:
        if one is not two:
            # held, the MLP's norm shows a block that is not parallel after all: its parts then miss J
            return [
                Branch("attention", one, "output", held=two, before=one),
                Branch("mlp", two, "output", before=two),
            ]
        if attention is None:
            return []
        return [
            Branch("attention", attention, "input", before=one),
            Branch("mlp", one, "output", held=attention, before=one),
            Branch("block", one, "output", before=one),
        ]
    if ends[0] is None or ends[1] is None or attention is None or mlp is None:
        return []
    if placement == "sandwich" and one is not None and two is not None:
        return [
            Branch("attention", one, "output", end=ends[0], before=one, after=ends[0]),
            Branch("mlp", two, "output", end=ends[1], before=two, after=ends[1]),
        ]
    if placement in ("norm-after-branch", "post-ln"):
        return [
            Branch("attention", attention, "input", end=ends[0], after=ends[0]),
            Branch("mlp", _entrance(block, mlp), "input", end=ends[1], after=ends[1]),
        ]
    return []


@torch.no_grad()
def record(block: nn.Module, call: Call, modules: Sequence[nn.Module]) -> Tracer:
    """Run the block once and keep what the modules took in and gave."""
    tracer = Tracer(list(dict.fromkeys(modules)))
    with tracer:
        run_block(block, call, hidden_input(call))
    return tracer


class _Arrived(Exception):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Any:
    """The same arguments with another hidden state, in the shape of the former."""
    if args:
        return (value.reshape(args[0].shape), *args[1:]), kwargs
    name = next(k for k in ("hidden_states", "x") if k in kwargs)
    return args, {**kwargs, name: value.reshape(kwargs[name].shape)}


@contextmanager
def _intervened(branch: Branch, value: Tensor, held: Tensor | None) -> Iterator[None]:
    """Hooks that put ``value`` where the branch begins, hold the other branch, and stop where it ends."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Arrived(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        if branch.at == "output":
            hook: Any = branch.begin.register_forward_hook(lambda _, __, out: value.reshape(out.shape))
        else:
            hook = branch.begin.register_forward_pre_hook(
                lambda _, args, kwargs: _with_input(args, kwargs, value), with_kwargs=True
            )
        stack.callback(hook.remove)
        if branch.held is not None and held is not None:
            hook = branch.held.register_forward_pre_hook(
                lambda _, args, kwargs: _with_input(args, kwargs, held), with_kwargs=True
            )
            stack.callback(hook.remove)
        if branch.end is not None:
            stack.callback(branch.end.register_forward_pre_hook(stop, with_kwargs=True).remove)
        yield


def branch_map(block: nn.Module, call: Call, branch: Branch, seen: Tracer) -> tuple[Map, Tensor]:
    """A branch as a function, with the block's own input fixed, and the point at which the model used it.

    The function replaces the tensor at which the branch begins and returns what arrives at its end: the
    branch's output plus what does not depend on the tensor. Its Jacobian is the branch's.

    Args:
        block: The block.
        call: A captured call of it.
        branch: The branch.
        seen: What :func:`record` kept on this call of the modules of the branch.

    Raises:
        BranchError: The branch does not begin at a hidden state of the block's size.
    """
    source = seen.trace.outputs if branch.at == "output" else seen.trace.inputs
    hidden, point = hidden_input(call), source.get(branch.begin)
    if point is None or point.numel() != hidden.numel():
        raise BranchError(f"the {branch.site} branch does not begin at a hidden state of the block")
    held = None if branch.held is None else seen.trace.inputs[branch.held]

    def run(value: Tensor) -> Tensor:
        with _intervened(branch, value.clone(), held):
            try:
                result = run_block(block, call, hidden)
            except _Arrived as arrived:
                result = arrived.value
        return result.reshape(hidden.shape)

    return run, point.detach().reshape(hidden.shape)
