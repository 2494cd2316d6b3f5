"""Where a block's norms sit, measured by scaling and by intervention instead of looked up by name.

* A block whose output keeps its size when a large input grows 256-fold ends in a norm: Post-LN.
* A branch whose output does not change when its input grows sits behind a norm.
* A branch whose doubled output leaves the block's output alone has a norm after it.
* Branches that do not see each other are parallel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from preln.models.structure import Parts, Tracer, branches, hidden_of, is_norm

SAME = 0.05
Call = tuple[tuple[Any, ...], dict[str, Any]]


def replay(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    """Run a block again on another hidden state, with the masks and positions of a captured call."""
    args, kwargs = call
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "past_key_value", "layer_past")}
    if args:
        return hidden_of(block(hidden, *args[1:], **kwargs))
    return hidden_of(block(**{**kwargs, "hidden_states": hidden}))


def _size_ratio(a: Tensor, b: Tensor) -> float:
    """``|a| / |b|`` over all entries."""
    return float(a.float().norm() / b.float().norm().clamp_min(1e-30))


def _relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` over all entries."""
    return _size_ratio(a - b, b)


def _doubled(block: nn.Module, call: Call, hidden: Tensor, module: nn.Module) -> Tensor:
    """The block's output when one module inside returns twice what it would."""

    def double(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return 2 * output
        return (2 * output[0], *output[1:])

    handle = module.register_forward_hook(double)
    try:
        return replay(block, call, hidden)
    finally:
        handle.remove()


def _norm_before(norms: list[nn.Module], trace_inputs: dict, trace_outputs: dict, module: nn.Module | None):
    """The norm whose output tensor is what ``module`` takes in, or None."""
    source = trace_inputs.get(module)
    if source is None:
        return None
    for norm in norms:
        out = trace_outputs.get(norm)
        if out is not None and out.shape == source.shape and (out is source or torch.equal(out, source)):
            return norm
    return None


@torch.no_grad()
def inspect_block(block: nn.Module, call: Call, width: int) -> tuple[Parts, str, dict[str, Any]]:
    """The parts of one block, its norm placement, and the measurements behind the verdict.

    Args:
        block: The block.
        call: Arguments of a call of this block, as captured.
        width: Hidden size.
    """
    norms = [m for m in block.modules() if is_norm(m, width)]
    attention, mlp = branches(block)
    linears = [m for m in block.children() if isinstance(m, nn.Linear)]
    entrance = linears[0] if mlp in linears else mlp
    watched = [*norms, *[m for m in (attention, mlp, entrance) if m is not None]]
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    # a unit-sized stream that no trained or random branch dwarfs, and far from the norms' eps
    hidden = hidden / hidden.float().square().mean().sqrt().clamp_min(1e-6).to(hidden.dtype)
    with Tracer(list(dict.fromkeys(watched))) as trace:
        once = replay(block, call, hidden)
    # large enough to outweigh what the branches add, small enough not to overflow half precision
    low, high = (2.0**5, 2.0**13) if hidden.dtype == torch.float16 else (2.0**10, 2.0**18)
    large = replay(block, call, low * hidden)
    with Tracer(list(dict.fromkeys(watched))) as scaled_trace:
        scaled = replay(block, call, high * hidden)
    parts = Parts(
        attention=attention,
        mlp=mlp,
        attention_norm=_norm_before(norms, trace.inputs, trace.outputs, attention),
        mlp_norm=_norm_before(norms, trace.inputs, trace.outputs, entrance),
    )
    evidence: dict[str, Any] = {
        "output_growth": _size_ratio(scaled, large) * low / high,
        "norms_in_block": len(norms),
    }
    if attention is not None and attention in trace.outputs:
        first, again = trace.outputs[attention], scaled_trace.outputs[attention]
        evidence["attention_change_under_scaling"] = _relative(again, first)
        evidence["attention_reads_a_norm"] = parts.attention_norm is not None
        moved = _doubled(block, call, hidden, attention)
        evidence["output_change_when_attention_doubled"] = _size_ratio(moved - once, first)
        if entrance is not None and entrance in trace.inputs:
            with Tracer([entrance]) as moved_trace:
                _doubled(block, call, hidden, attention)
            change = _relative(moved_trace.inputs[entrance], trace.inputs[entrance])
            evidence["mlp_input_change_when_attention_doubled"] = change
    if mlp is not None and mlp in trace.outputs:
        moved = _doubled(block, call, hidden, mlp)
        evidence["output_change_when_mlp_doubled"] = _size_ratio(moved - once, trace.outputs[mlp])
    return parts, verdict(evidence), evidence


def verdict(evidence: dict[str, Any]) -> str:
    """The placement that the measurements of :func:`inspect_block` show, or ``unknown``."""
    if evidence["norms_in_block"] == 0:
        return "unknown"
    if evidence["output_growth"] < 0.1:
        return "post-ln"
    keys = ("attention_change_under_scaling", "output_change_when_mlp_doubled")
    if any(key not in evidence for key in keys):
        return "unknown"
    # a module that adds the residual itself (BLOOM) grows with the stream although its branch reads a norm
    behind = evidence["attention_change_under_scaling"] < SAME or evidence["attention_reads_a_norm"]
    after = evidence["output_change_when_mlp_doubled"] < SAME
    if after:
        return "sandwich" if behind else "norm-after-branch"
    if not behind:
        return "unknown"
    seen = evidence.get("mlp_input_change_when_attention_doubled")
    if seen is None:
        return "unknown"
    return "parallel" if seen < 1e-6 else "pre-ln"
