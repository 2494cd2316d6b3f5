"""Removing one branch of a block, attention or MLP: its last linear map made zero, and the proof of it.

Nothing here knows an architecture. Which modules are a branch is read off :func:`preln.models.anatomy`;
which weights end it is found by setting them to zero; that nothing of it is left is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.inspect import anatomy
from preln.models.maps import capture_calls
from preln.models.residual import as_tokens
from preln.models.roles import readers, same
from preln.models.structure import Parts, Trace
from preln.models.trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("attention", "mlp")
_SERIAL = ("pre-ln", "sandwich", "norm-after-branch")


@dataclass(frozen=True)
class Half:
    """One branch of one block, silenced.

    Attributes:
        index: The block, counted from 0.
        kind: ``attention`` or ``mlp``.
        modules: What makes the branch: one module, or several that read one norm (attention and a
            state-space layer side by side).
        zeroed: The parameters that were set to zero.
        parts: The parts of the block.
        placement: Its measured placement.
        trial: The block on a fixed stream.
    """

    index: int
    kind: str
    modules: tuple[nn.Module, ...]
    zeroed: tuple[nn.Parameter, ...]
    parts: Parts
    placement: str
    trial: Trial

    @property
    def before(self) -> nn.Module | None:
        """The norm in front of the branch."""
        return self.parts.attention_norm if self.kind == "attention" else self.parts.mlp_norm

    @property
    def after(self) -> nn.Module | None:
        """The norm behind the branch."""
        return self.parts.attention_norm_after if self.kind == "attention" else self.parts.mlp_norm_after


def contributes_nothing(trial: Trial, parts: Parts, placement: str, kind: str) -> bool:
    """Whether a branch, as its weights now are, leaves the stream as it is.

    In a serial block the stream arrives at the second branch as it entered the block (attention gone), or
    leaves the block as it arrived there (MLP gone); in Post-LN it arrives so at the norm behind the branch.
    In a parallel block the output is that of the block with zeros in place of what the branch returns, where
    zeros in place of both branches give the stream itself.
    """
    y, trace = trial.run()
    seen = trace.inputs
    if placement == "parallel":
        if parts.attention is None or parts.mlp is None:
            return False
        branch = parts.attention if kind == "attention" else parts.mlp
        nothing = trial.without([parts.attention, parts.mlp])[0]
        return same(y, trial.without([branch])[0]) and same(nothing, trial.x)
    if placement == "post-ln":
        first, last = parts.attention_norm_after, parts.mlp_norm_after
        if first is None or last is None:
            return False
        if kind == "attention":
            return same(seen.get(first), trial.x)
        return same(seen.get(last), trace.outputs.get(first))
    if placement not in _SERIAL:
        return False
    if parts.mlp is None or parts.attention is None:
        return same(y, trial.x)
    door = parts.mlp_norm or parts.mlp
    return same(seen.get(door), trial.x) if kind == "attention" else same(y, seen.get(door))


def _stem(name: str) -> str:
    """What a weight and its bias share in their names: ``o_proj`` of ``o_proj.bias`` and ``o_proj_bias``."""
    path, _, last = name.rpartition(".")
    return path.rpartition(".")[2] if last in ("weight", "bias") else last.removesuffix("_bias")


def _candidates(branch: nn.Module, trace: Trace, norms: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Groups of parameters that may be the branch's last linear map, likeliest first.

    A group is all that shares a name inside the branch, so that the experts of a mixture, fused into one
    tensor or apart, and an expert beside them, go together. The later a module runs, and the later a tensor
    is registered in it, the likelier.
    """
    inside = set(branch.modules()) - set(norms)
    ran = [m for m in dict.fromkeys(reversed(trace.order)) if m in inside]
    ran += [m for m in reversed(list(branch.modules())) if m in inside and m not in ran]
    named = {
        id(p): (name, p)
        for name, p in branch.named_parameters()
        if not any(p is q for norm in norms for q in norm.parameters())
    }
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.values():
        groups.setdefault(_stem(name), []).append(parameter)
    order = [
        _stem(named[id(p)][0]) for m in ran for p in reversed(list(m._parameters.values())) if id(p) in named
    ]
    return [groups[s] for s in dict.fromkeys(order) if any(p.ndim > 1 for p in groups[s])]


def _silence(trial: Trial, branch: nn.Module, also: Sequence[nn.Parameter], half: tuple[Parts, str, str],
             *, alone: bool) -> list[nn.Parameter]:  # fmt: skip
    """Zero the first group of parameters that silences the branch; nothing where none does.

    Args:
        trial: The block on a fixed stream.
        branch: A module of the branch.
        also: Parameters that go with any group (the bias of a norm behind the branch).
        half: Parts and placement of the block, and the kind of branch.
        alone: Whether the module is the whole branch, so that the block itself shows whether it is gone;
            else its own output has to be zero.
    """
    for group in _candidates(branch, trial.trace, trial.norms):
        chosen = [*group, *also]
        former = [p.detach().clone() for p in chosen]
        for parameter in chosen:
            parameter.zero_()
        if contributes_nothing(trial, *half) if alone else _is_zero(trial.run()[1].outputs.get(branch)):
            return chosen
        for parameter, value in zip(chosen, former, strict=True):
            parameter.copy_(value)
    return []


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(tensor.any())


def _choices(trial: Trial, parts: Parts, placement: str, kind: str) -> list[list[nn.Module]]:
    """What may be the whole branch: its module, or all modules that read the norm in front of it."""
    branch = parts.attention if kind == "attention" else parts.mlp
    norm = parts.attention_norm if kind == "attention" else parts.mlp_norm
    if branch is None:
        return []
    together = readers(norm, trial.trace, trial.norms) if placement in _SERIAL else []
    return [[branch], *([together] if branch in together and len(together) > 1 else [])]


def _silence_half(trial: Trial, parts: Parts, placement: str, index: int, kind: str) -> Half:
    """Silence one branch.

    Raises:
        InputError: The block has no such branch, or nothing in it silences it exactly.
    """
    where = f"block {index}"
    if placement == "unknown":
        raise InputError(f"{where}: its norms sit as in no known block: remove whole blocks instead")
    if (parts.attention if kind == "attention" else parts.mlp) is None:
        raise InputError(f"{where}: has no {kind} branch of its own: remove the whole block instead")
    after = parts.attention_norm_after if kind == "attention" else parts.mlp_norm_after
    bias = getattr(after, "bias", None) if placement != "post-ln" else None
    also = [bias] if isinstance(bias, nn.Parameter) else []
    for choice in _choices(trial, parts, placement, kind):
        parameters = [p for m in choice for p in m.parameters()]
        former = [p.detach().clone() for p in parameters]
        half = (parts, placement, kind)
        found = [_silence(trial, m, also, half, alone=len(choice) == 1) for m in choice]
        if all(found) and contributes_nothing(trial, *half):
            zeroed = tuple(p for group in found for p in group)
            return Half(index, kind, tuple(choice), zeroed, parts, placement, trial)
        for parameter, value in zip(parameters, former, strict=True):
            parameter.copy_(value)
    raise InputError(f"{where}: no weights alone end its {kind} branch: remove the whole block instead")


@torch.no_grad()
def silence_halves(model: PreTrainedModel, halves: Iterable[tuple[int, str]]) -> list[Half]:
    """Set the last linear map (weight and bias) of some branches to exact zero, in place, and prove it.

    With it the branch adds exactly zero to the stream, whatever comes in: the shapes of the model stay. The
    bias of a norm behind the branch is part of it and goes too. In Post-LN blocks the norms stay.

    Args:
        model: A causal model with weights of its own.
        halves: Block, counted from 0, and ``attention`` or ``mlp``.

    Raises:
        InputError: Quantised weights, weights that other blocks share, a block whose placement is unknown, or
            a branch that no weights of its own end.
    """
    found = anatomy(model)
    table = next(found.embedding.parameters())
    ids = torch.arange(3, 11, device=table.device).remainder(table.shape[0])[None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        calls = capture_calls(model, found, as_tokens(ids))
        width = model.config.get_text_config().hidden_size
        trials: dict[int, Trial] = {}
        result: list[Half] = []
        for index, kind in halves:
            _check_weights(found.blocks, index)
            trial = trials.setdefault(index, Trial(found.blocks[index], calls[index], width))
            result.append(_silence_half(trial, found.parts(index), found.placements[index], index, kind))
        for half in result:  # once more, now that all are gone
            if not contributes_nothing(half.trial, half.parts, half.placement, half.kind):
                raise InputError(f"block {half.index}: its {half.kind} branch still acts beside the others")
    finally:
        for module, mode in modes:
            module.training = mode
    return result


def _check_weights(blocks: Sequence[nn.Module], index: int) -> None:
    """Refuse weights that cannot be set to zero in one block alone.

    Raises:
        InputError: Quantised or shared weights, naming the first.
    """
    others = {id(p) for i, block in enumerate(blocks) if i != index for p in block.parameters()}
    for name, parameter in blocks[index].named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"block {index}: the weight {name!r} is stored as {parameter.dtype}: quantised branches "
                "cannot be removed: load the model in a floating-point dtype, or remove whole blocks"
            )
        if id(parameter) in others:
            raise InputError(f"block {index}: shares {name!r} with others: remove whole blocks instead")
