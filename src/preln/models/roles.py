"""Which modules of a block are its two branches, and which norms they read: names propose, tensors decide."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from preln.models.structure import Parts, Trace

_MIXERS = ("attn", "attention", "mixer")
_MLPS = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "output")
_NORMS = ("norm", "ln_", "layernorm")


def _rounding(*tensors: Tensor) -> float:
    """The coarsest rounding unit among floating-point tensors; 0 for integers."""
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shape or dtype.

    A dtype's own rounding is forgiven: some blocks keep the stream in float32 and their branches in half.
    """
    if a is None or b is None or a.numel() != b.numel():
        return False
    left, right = a.reshape(-1).float(), b.reshape(-1).to(a.device).float()
    return bool((left - right).norm() <= 4 * _rounding(a, b) * right.norm())


def same_but_for_a_bias(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors ``[..., d]`` differ by one vector at all tokens: a bias, which is no stream."""
    if a is None or b is None or a.numel() != b.numel() or b.shape[:-1].numel() < 2:
        return False
    left, right = a.reshape(b.shape).float(), b.float()
    bias = (left - right).flatten(0, -2).mean(0)
    return bool((left - bias - right).norm() <= 4 * _rounding(a, b) * (right.norm() + left.norm()))


def proportional(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether ``a`` is a nonzero multiple of ``b`` (some architectures scale what a branch reads)."""
    if a is None or b is None or a.numel() != b.numel() or not a.is_floating_point():
        return False
    left, right = a.reshape(-1).float(), b.reshape(-1).to(a.device).float()
    square = float(right @ right)
    factor = float(left @ right) / square if square > 0 else 0.0
    return factor != 0 and same(a, (factor * right).to(a.dtype))


def _named(block: nn.Module, words: tuple[str, ...], ran: set[nn.Module]) -> nn.Module | None:
    """The shallowest module that ran, has weights, and whose own name holds one of ``words`` and no norm."""
    found = []
    for place, (path, module) in enumerate(block.named_modules()):
        name = path.rpartition(".")[2].lower()
        named = any(word in name for word in words) and not any(word in name for word in _NORMS)
        if named and module in ran and any(True for _ in module.parameters()):
            found.append((path.count("."), place, module))
    return min(found, key=lambda f: f[:2])[2] if found else None


def _topmost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of ``modules`` that lie in none of the others."""
    modules = list(dict.fromkeys(modules))
    inner = {child for m in modules for child in m.modules() if child is not m}
    return [m for m in modules if m not in inner]


def readers(norm: nn.Module | None, trace: Trace, norms: list[nn.Module]) -> list[nn.Module]:
    """The topmost modules with weights that read the output of ``norm``, in order of execution."""
    out = trace.outputs.get(norm) if norm is not None else None
    return _topmost(
        m
        for m in dict.fromkeys(trace.order)
        if m not in norms and any(True for _ in m.parameters()) and proportional(trace.inputs.get(m), out)
    )


def _norm_before(norms: list[nn.Module], trace: Trace, members: set[nn.Module]) -> nn.Module | None:
    """The first norm, outside or inside a branch, whose output one of the branch's modules reads."""
    for norm in norms:
        out = trace.outputs.get(norm)
        if any(m is not norm and m not in norms and proportional(trace.inputs.get(m), out) for m in members):
            return norm
    return None


def _norm_after(norms: list[nn.Module], trace: Trace, branch: nn.Module | None) -> nn.Module | None:
    """The norm, outside a branch, that takes the branch's output."""
    if branch is None:
        return None
    inside, out = set(branch.modules()), trace.outputs.get(branch)
    return next((n for n in norms if n not in inside and same(trace.inputs.get(n), out)), None)


def _members(mlp: nn.Module | None, attention: nn.Module | None, trace: Trace) -> set[nn.Module]:
    """The modules of the MLP; where it is spread over the block, all that runs between attention and it."""
    if mlp is None:
        return set()
    members = set(mlp.modules())
    if attention is not None:
        first, last = trace.order.index(attention), trace.order.index(mlp)
        members |= set(trace.order[first + 1 : last + 1]) - set(attention.modules())
    return members


def find_parts(block: nn.Module, hidden: Tensor, trace: Trace, norms: list[nn.Module]) -> Parts:
    """The branches of a block and the norms beside them, from one traced run of the block.

    Args:
        block: The block.
        hidden: Its input in that run.
        trace: Everything that its modules took and gave.
        norms: Those of its modules that are norms, in order of execution.
    """
    ran = set(trace.order)
    entries = [n for n in norms if same(trace.inputs.get(n), hidden)]
    attention, mlp = _named(block, _MIXERS, ran), _named(block, _MLPS, ran)
    inside = set(attention.modules()) if attention is not None else set()
    if mlp in inside:
        mlp = None
    linears = [m for m in block.children() if isinstance(m, nn.Linear) and m in ran]
    if mlp is None and linears:
        mlp = linears[-1]
    if attention is None:
        # recurrent, convolutional and state-space layers go by many names, and read the first norm
        taken = set(mlp.modules()) if mlp is not None else set()
        attention = next((m for n in entries for m in readers(n, trace, norms) if m not in taken), None)
        inside = set(attention.modules()) if attention is not None else set()
    if mlp is None:
        rest = [n for n in norms if n not in inside and n not in entries]
        mlp = next((m for n in rest for m in readers(n, trace, norms) if m not in inside), None)
    members = _members(mlp, attention, trace)
    outer = [n for n in norms if n not in inside]
    mlp_norm = _norm_before(outer, trace, members) or _norm_before(norms, trace, members)
    # a module that adds the stream by itself hands the stream, not its branch, to the MLP's norm
    behind = [n for n in norms if n is not mlp_norm]
    return Parts(
        attention=attention,
        mlp=mlp,
        attention_norm=_norm_before(entries, trace, inside),
        mlp_norm=mlp_norm,
        attention_norm_after=_norm_after(behind, trace, attention),
        mlp_norm_after=_norm_after(norms, trace, mlp),
    )
