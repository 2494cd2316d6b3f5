"""The anatomy of a model: structure and norm placement from one short run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.placement import inspect_block
from preln.models.roles import same
from preln.models.structure import Anatomy, Trace, Tracer, find_blocks, is_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRE_LN = ("pre-ln", "parallel")


@contextmanager
def _finite_weights(model: PreTrainedModel) -> Iterator[None]:
    """Zeros in place of weights that are not finite, for a while: they do not decide where norms sit.

    Whoever measures afterwards meets the broken weight and can name its place.
    """
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    broken = [p for p in model.parameters() if p.dtype in plain and not bool(torch.isfinite(p).all())]
    kept = [p.detach().clone() for p in broken]
    try:
        for parameter in broken:
            parameter.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        yield
    finally:
        for parameter, values in zip(broken, kept, strict=True):
            parameter.copy_(values)


def _same_stream(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether a stream was handed on as it was, be it that half precision overflowed in it."""
    return a is not None and b is not None and same(a.nan_to_num(), b.nan_to_num())


def _run(model: PreTrainedModel, ids: Tensor, watched: list[nn.Module]) -> Trace:
    """One traced pass over token ids alone.

    Raises:
        InputError: The model wants more than token ids.
    """
    with Tracer(watched) as trace:
        try:
            model(input_ids=ids, use_cache=False)
        except Exception as error:  # whatever an architecture raises where its other inputs are missing
            reason = (str(error).splitlines() or [""])[0][:120]
            raise InputError(
                f"{type(model).__name__}: a pass over token ids alone fails "
                f"({type(error).__name__}: {reason}): this architecture is not supported"
            ) from error
    return trace


def _check_stream(kind: str, blocks: list[nn.Module], trace: Trace, shape: tuple[int, ...]) -> None:
    """Refuse a model whose blocks do not hand one residual stream ``[sequences, tokens, width]`` on.

    Raises:
        InputError: Naming the first block that does not.
    """
    former: Tensor | None = None
    beside: list[Tensor] | None = None
    for index, block in enumerate(blocks):
        runs = trace.entered[block]
        if runs != 1:
            twin = blocks.index(block) < index or blocks.count(block) > 1
            why = "it stands in the list more than once" if twin else "its weights are not one layer's"
            end = why if runs else "it needs more than token ids"
            raise InputError(f"{kind}: block {index} runs {runs} times in a pass ({end}): not supported")
        args, kwargs = trace.calls[block]
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or not x.is_floating_point() or block not in trace.outputs:
            raise InputError(f"{kind}: block {index} does not map a hidden state to one: not supported")
        if tuple(x.shape) != shape or tuple(trace.outputs[block].shape) != shape:
            raise InputError(
                f"{kind}: block {index} takes {list(x.shape)} and returns {list(trace.outputs[block].shape)} "
                f"where one residual stream is {list(shape)}: not supported"
            )
        if former is not None and not _same_stream(x, former):
            raise InputError(
                f"{kind}: block {index}: its input is not the output of block {index - 1}: "
                "this architecture changes the residual stream between blocks"
            )
        if not _same_stream(x, trace.inputs[block]):
            raise InputError(f"{kind}: block {index} overwrites its input in place: not supported")
        others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not x]
        others = [v for v in others if v.is_floating_point() and tuple(v.shape) == shape]
        if beside is not None and not all(map(_same_stream, others, beside)):
            raise InputError(f"{kind}: block {index} carries a second hidden state: not supported")
        former, beside = trace.outputs[block], others


_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Anatomy]] = WeakKeyDictionary()


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a module, a hook, or the values of a parameter do."""
    modules = [(id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    # tensors made in inference mode count no versions
    tensors = [
        (id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in model.parameters()
    ]
    return (*modules, *tensors)


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find blocks, branches, norms and head of a causal model, and measure where its norms sit.

    Runs eight fixed token ids through the model and every block a few times more, once for a model object as
    long as its modules and weights stay what they are. The model is left as it was.

    Raises:
        InputError: The blocks or the head cannot be found, the model needs more than token ids, or its blocks
            do not hand one residual stream on to each other.
    """
    state, former = _state(model), _known.get(model)
    if former is None or former[0] != state:
        former = state, _measure(model)
        _known[model] = former
    return replace(former[1])


@torch.no_grad()
def _measure(model: PreTrainedModel) -> Anatomy:
    """What :func:`anatomy` finds, measured.

    Raises:
        InputError: The blocks or the head cannot be found, the model needs more than token ids, or its blocks
            do not hand one residual stream on to each other.
    """
    path, blocks = find_blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        raise InputError(f"{type(model).__name__}: no language-model head found: this is no causal model")
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if width is None:
        raise InputError(f"{type(model).__name__}: its configuration names no hidden size: not supported")
    inside = {id(m) for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and is_norm(m, width)]
    table = next(embedding.parameters())
    ids = torch.arange(3, 11, device=table.device).remainder(table.shape[0])[None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _finite_weights(model):
            trace = _run(model, ids, [*dict.fromkeys(blocks), *outside, head])
            _check_stream(type(model).__name__, blocks, trace, (*ids.shape, width))
            # only a norm that takes exactly x[L] is the final norm
            last = trace.outputs[blocks[-1]]
            final = next((m for m in outside if _same_stream(trace.inputs.get(m), last)), None)
            found = Anatomy(path=path, blocks=blocks, final_norm=final, head=head, embedding=embedding)
            for index, block in enumerate(blocks):
                parts, placement, evidence = inspect_block(block, trace.calls[block], width)
                found.block_parts.append(parts)
                found.placements.append(placement)
                found.evidence[f"block_{index}"] = evidence
    finally:
        for module, mode in modes:
            module.training = mode
    if len(set(found.placements)) == 1:
        found.placement = found.placements[0]
    if found.placement == "unknown":
        found.evidence["placements"] = found.placements
    return found


def require_pre_ln(found: Anatomy, what: str) -> None:
    """Refuse a model whose blocks are not Pre-LN for a measure or claim that only holds there.

    Raises:
        InputError: Naming the measured placement.
    """
    if found.placement not in PRE_LN:
        raise InputError(
            f"{what}: needs a Pre-LN model, and this one measures as {found.placement}: "
            "ask for measures without Pre-LN assumptions"
        )
