"""Laws that a claimed anatomy must obey, tested on a whole model without the code that measured it.

The one idea: hand a branch the same noise in every sequence in place of its norm's output. What it adds to
the stream is then the same in every sequence, while the stream itself is not; so the difference of two points
of the stream agrees between sequences exactly where nothing but that branch lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from preln.models import Anatomy
from preln.models.residual import on_blocks

IDS = torch.tensor([[5, 9, 17, 33, 65, 12, 7], [101, 88, 4, 23, 42, 71, 6]])
TOLERANCE = 2e-5


def first(value: Any) -> Tensor:
    """The tensor that a module returned, alone or at the head of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


def gap(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``, whatever the shapes."""
    return float((a.flatten() - b.flatten()).norm() / b.norm().clamp_min(1e-30))


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was handed: its first tensor."""
    return next(v for v in (*args, kwargs.get("hidden_states"), *kwargs.values()) if isinstance(v, Tensor))


@contextmanager
def listening(modules: dict[str, nn.Module | None], replaced: dict[nn.Module, Callable] | None = None):
    """Record copies of what modules take (``name<``) and give (``name>``); some give something else."""
    heard: dict[str, Tensor] = {}

    def give(module: nn.Module, _: Any, output: Any) -> Any:
        change = (replaced or {}).get(module)
        if change is None or isinstance(output, Tensor):
            return change and change(output)
        return getattr(output, "_make", type(output))([change(output[0]), *output[1:]])

    with ExitStack() as stack:
        for module in replaced or {}:
            stack.callback(module.register_forward_hook(give).remove)
        for name, module in modules.items():
            if module is None:
                continue

            def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                heard.setdefault(f"{name}<", taken(args, kwargs).detach().clone())

            def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                heard.setdefault(f"{name}>", first(output).detach().clone())

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield heard


def same_in_every_sequence(output: Tensor) -> Tensor:
    """Noise shaped like ``output``, equal in both sequences."""
    generator = torch.Generator().manual_seed(7)
    rows = output.view(IDS.shape[0], -1)
    return (
        torch.randn(rows.shape[1], generator=generator)
        .expand_as(rows)
        .reshape(output.shape)
        .to(output)
        .contiguous()
    )


def disagreement(difference: Tensor, stream: Tensor) -> float:
    """How far a difference varies between sequences, as a part of how far the stream does."""
    d, s = (t.reshape(IDS.shape[0], -1) for t in (difference, stream))
    return float((d[0] - d[1]).norm() / (s[0] - s[1]).norm())


@torch.no_grad()
def stream_laws(model: nn.Module, found: Anatomy) -> list[str]:
    """x[l] is what the model itself reports, and the final norm takes exactly x[L]."""
    states: list[Tensor] = []
    ends = {"final": found.final_norm, "head": found.head}

    def visit(index: int, x: Tensor, y: Tensor) -> None:
        states.extend([x.clone(), y.clone()] if index == 0 else [y.clone()])

    with on_blocks(found.blocks, visit), listening(ends) as heard:
        reported = model(input_ids=IDS, use_cache=False, output_hidden_states=True).get("hidden_states")
    notes = []
    if not isinstance(reported, tuple) or len(reported) <= found.num_blocks:
        notes.append("hidden states are not reported")
    else:
        off = [i for i in range(found.num_blocks) if gap(states[i], reported[i]) > TOLERANCE]
        if off and all(gap(x, y) <= TOLERANCE for x, y in zip(states[1:], reported, strict=False)):
            notes.append("hidden_states starts at x[1]")
        elif off:
            notes.append(f"FAILS: x[{off[0]}] is not hidden_states[{off[0]}]")
    if found.final_norm is None:
        return [*notes, "no final norm"]
    if gap(heard["final<"], states[-1]) > 0:
        notes.append("FAILS: the final norm does not take x[L]")
    if heard["head<"].shape != heard["final>"].shape or gap(heard["head<"], heard["final>"]) > TOLERANCE:
        notes.append("the head reads the final norm through something else")
    return notes


@torch.no_grad()
def block_laws(model: nn.Module, found: Anatomy, index: int) -> list[str]:
    """The sum law of one block's claimed placement; the list of laws that fail."""
    parts, block, placement = found.parts(index), found.blocks[index], found.placements[index]
    watched: dict[str, nn.Module | None] = {"block": block} | vars(parts)

    def run(replaced: dict[nn.Module, Callable] | None = None) -> dict[str, Tensor]:
        with listening(watched, replaced) as heard:
            model(input_ids=IDS, use_cache=False)
        return heard

    plain = run()
    x, failed = plain["block<"], []

    def law(name: str, value: float, limit: float = TOLERANCE) -> None:
        if not value <= limit:
            failed.append(f"FAILS in block {index}: {name} ({value:.1e})")

    if placement == "post-ln":
        behind = {"attention_norm_after": x, "mlp_norm_after": plain["attention_norm_after>"]}
        law("the output is the last norm's", gap(plain["block>"], plain["mlp_norm_after>"]), 0.0)
        linear = {n: m for n, m in block.named_modules() if not list(m.children()) and list(m.parameters())}
        with listening(linear) as heard:
            model(input_ids=IDS, use_cache=False)
        for name, stream in behind.items():
            added = plain[f"{name}<"].reshape(stream.shape) - stream
            outputs = [v for k, v in heard.items() if k.endswith(">") and v.numel() == added.numel()]
            law(f"what {name} takes is the stream plus a layer", min(gap(added, v) for v in outputs))
        return failed
    if placement in ("pre-ln", "parallel", "sandwich") and parts.attention_norm is not None:
        law("the attention's norm takes x[l]", gap(plain["attention_norm<"], x), 0.0)
    single = parts.attention is None or parts.mlp is None
    doors = [n for n in (parts.attention_norm, parts.mlp_norm) if n is not None]
    if placement == "norm-after-branch":
        doors = [n for n in (parts.attention_norm_after, parts.mlp_norm_after) if n is not None]
    if parts.mlp is not None and placement in ("pre-ln", "parallel"):
        twice = run({parts.mlp: lambda output: 2 * output})
        changed = gap(twice["block>"], plain["block>"])
        law("the MLP passes no norm on its way out", float(changed < 1e-3), 0.5)
    if placement == "parallel":
        noisy = run({parts.attention: same_in_every_sequence} if parts.attention is not None else None)
        law("the MLP's norm takes x[l]", gap(plain["mlp_norm<"], x), 0.0)
        law("the MLP does not see the attention", gap(noisy["mlp<"], plain["mlp<"]), 0.0)
    if placement == "parallel" or single:
        other = run(dict.fromkeys(doors, same_in_every_sequence))
        law("y - x depends on its norm alone", disagreement(other["block>"] - other["block<"], x))
        return failed
    middle = "mlp_norm<" if parts.mlp_norm is not None else "mlp<"
    one = run({doors[0]: same_in_every_sequence})
    law("m - x depends on its norm alone", disagreement(one[middle].reshape(x.shape) - x, x))
    two = run({doors[1]: same_in_every_sequence})
    law("m does not depend on the MLP", gap(two[middle], plain[middle]), 0.0)
    rest = two["block>"] - two[middle].reshape(x.shape)
    law("y - m depends on its norm alone", disagreement(rest, two[middle]))
    for branch in ("attention", "mlp"):
        behind = getattr(parts, f"{branch}_norm_after")
        if behind is not None:
            law(f"the {branch} passes a norm", gap(plain[f"{branch}_norm_after<"], plain[f"{branch}>"]), 0.0)
    return failed
