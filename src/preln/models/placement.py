"""Where a block's norms sit: a proposal from which tensors flow where, then laws that must hold exactly.

Every placement says what is left of a block when a branch is taken away, and taking away is an experiment:
let x be the block's input, y its output, and m what the second norm takes in.

* Pre-LN, ``m = x + F(N(x))``, ``y = m + G(N'(m))``: without F, m is x; without G, y is m; F and G do not
  change when x grows; noise in place of F reaches G.
* Parallel, ``y = x + F(N(x)) + G(N'(x))``: without both, y is x; noise in place of F does not reach G.
* Sandwich, and norm after the branch: the same with a norm's output as the branch.
* Post-LN, ``m = N(x + F(x))``, ``y = N'(m + G(m))``: without F, N takes in x; without G, N' takes in m; y is
  what N' gives.

A learned or constant factor on a branch passes, and a bias; a factor on the stream does not. A block that
obeys no set of laws is ``unknown``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from preln.models.roles import find_parts, same, same_but_for_a_bias
from preln.models.structure import Parts, Trace
from preln.models.trial import Call, Ends, Trial, replay, returning

__all__ = ["Call", "inspect_block", "replay"]

SAME = 0.05


def _relative(a: Tensor | None, b: Tensor | None) -> float:
    """``|a - b| / |b|`` over all entries; infinite where one is missing, 0 where both are zero."""
    if a is None or b is None or a.numel() != b.numel():
        return float("inf")
    left, right = a.reshape(-1).float(), b.reshape(-1).float()
    gap = float((left - right).norm())
    return gap / max(float(right.norm()), 1e-30) if gap else 0.0


def _input(trace: Trace, module: nn.Module | None) -> Tensor | None:
    return trace.inputs.get(module) if module is not None else None


def _residual_laws(trial: Trial, parts: Parts, evidence: dict[str, Any]) -> str:
    """The placement of a block that adds its branches to a stream it does not norm, or ``unknown``."""
    before, after = parts.attention_norm is not None, parts.attention_norm_after is not None
    # what the second branch starts from: its norm's input, or its own where it has none in front
    door = parts.mlp_norm or parts.mlp
    first = trial.ends(parts.attention, parts.attention_norm, parts.attention_norm_after)
    second = trial.ends(parts.mlp, parts.mlp_norm, parts.mlp_norm_after)
    if not first or not second:
        return _single(trial, parts, first or second, evidence)
    if before != (parts.mlp_norm is not None) or after != (parts.mlp_norm_after is not None):
        return "unknown"
    if not before and not (after and same(_input(trial.trace, parts.attention), trial.x)):
        return "unknown"
    with returning(first[0], noise=True):
        noisy, trace = trial.run()
    evidence["output_change_under_noise_for_attention"] = _relative(noisy, trial.y)
    heard = _relative(_input(trace, door), _input(trial.trace, door))
    evidence["mlp_input_change_under_noise_for_attention"] = heard
    if heard == 0.0:
        return _parallel(trial, parts, first, second, evidence) if before and not after else "unknown"
    first_end = next(
        (e for e in first if same_but_for_a_bias(_input(trial.without(e)[1], door), trial.x)), None
    )
    evidence["stream_reaches_the_mlp_without_attention"] = first_end is not None
    second_end = next((e for e in second if _unchanged(trial, e, door)), None)
    evidence["stream_leaves_the_block_without_the_mlp"] = second_end is not None
    if first_end is None or second_end is None:
        return "unknown"
    if before:
        branches: dict[str, tuple[Ends, Ends]] = {
            "attention": (first_end, []),
            "mlp": (second_end, first_end),
        }
        if not _blind_to_scale(trial, branches, evidence):
            return "unknown"
    if after:
        return "sandwich" if before else "norm-after-branch"
    return "pre-ln"


def _passed_by(trial: Trial, ends: Ends, door: nn.Module | None) -> bool:
    """Whether the second branch starts from the block's input once the first is gone."""
    return same_but_for_a_bias(_input(trial.without(ends)[1], door), trial.x)


def _unchanged(trial: Trial, ends: Ends, door: nn.Module | None) -> bool:
    """Whether the block returns what its second branch started from once that branch is gone."""
    y, trace = trial.without(ends)
    return same_but_for_a_bias(_input(trace, door), y)


def _blind_to_scale(trial: Trial, branches: dict[str, tuple[Ends, Ends]], evidence: dict[str, Any]) -> bool:
    """Whether branches return the same on a large stream and on a larger one, as behind a norm they must.

    Args:
        trial: The block.
        branches: By name, the modules to watch, and those to silence so that the watched norm takes x alone.
        evidence: Takes the changes.
    """
    low, high = (2.0**7, 2.0**11) if trial.x.dtype == torch.float16 else (2.0**12, 2.0**18)
    for name, (ends, silenced) in branches.items():
        large, larger = (trial.without(silenced, factor=f)[1] for f in (low, high))
        changes = [_relative(larger.outputs.get(m), large.outputs.get(m)) for m in ends]
        # what overflowed is no number, and no number is not small
        evidence[f"{name}_change_under_scaling"] = next((c for c in changes if not c < SAME), max(changes))
    return all(evidence[f"{name}_change_under_scaling"] < SAME for name in branches)


def _parallel(
    trial: Trial, parts: Parts, first: list[Ends], second: list[Ends], evidence: dict[str, Any]
) -> str:
    """``parallel`` if both branches read the input's norm, and the block without both is the identity."""
    if not same(_input(trial.trace, parts.mlp_norm), trial.x):
        return "unknown"
    gone = next(
        ((a, b) for a in first for b in second if same_but_for_a_bias(trial.without([*a, *b])[0], trial.x)),
        None,
    )
    evidence["stream_leaves_the_block_without_both"] = gone is not None
    dead = evidence["output_change_under_noise_for_attention"] == 0.0
    if gone is None or dead:
        return "unknown"
    branches: dict[str, tuple[Ends, Ends]] = {"attention": (gone[0], []), "mlp": (gone[1], [])}
    return "parallel" if _blind_to_scale(trial, branches, evidence) else "unknown"


def _single(trial: Trial, parts: Parts, choices: list[Ends], evidence: dict[str, Any]) -> str:
    """``pre-ln`` if the block is ``x + F(N(x))`` with one branch, as state-space layers are."""
    norm = parts.attention_norm or parts.mlp_norm
    behind = parts.attention_norm_after or parts.mlp_norm_after
    if norm is None or behind is not None or not same(_input(trial.trace, norm), trial.x):
        return "unknown"
    end = next((e for e in choices if same_but_for_a_bias(trial.without(e)[0], trial.x)), None)
    evidence["stream_leaves_the_block_without_its_branch"] = end is not None
    if end is None or not _blind_to_scale(trial, {"branch": (end, [])}, evidence):
        return "unknown"
    return "pre-ln"


def _post_laws(trial: Trial, parts: Parts, last: nn.Module, evidence: dict[str, Any]) -> tuple[str, Parts]:
    """``post-ln`` and the norms behind the branches, for a block that ends in the norm ``last``."""
    for ends in trial.ends(parts.attention, parts.attention_norm, None):
        trace = trial.without(ends)[1]
        middle = next((n for n in trial.norms if n is not last and same(_input(trace, n), trial.x)), None)
        if middle is None or (same(_input(trial.trace, middle), trial.x) and not _silent(trial, ends)):
            continue
        evidence["norm_takes_the_stream_without_attention"] = True
        for others in trial.ends(parts.mlp, parts.mlp_norm, None):
            rest = trial.without(others)[1]
            if same(_input(rest, last), rest.outputs.get(middle)):
                evidence["norm_takes_the_stream_without_the_mlp"] = True
                return "post-ln", replace(
                    parts,
                    # the norm that a Post-LN branch reads stands behind the branch before
                    attention_norm=None,
                    mlp_norm=None,
                    attention_norm_after=middle,
                    mlp_norm_after=last,
                )
    return "unknown", parts


def _silent(trial: Trial, ends: Ends) -> bool:
    """Whether modules return zeros anyway, as freshly initialised output projections do."""
    return all(m in trial.trace.outputs and not trial.trace.outputs[m].any() for m in ends)


@torch.no_grad()
def inspect_block(block: nn.Module, call: Call, width: int) -> tuple[Parts, str, dict[str, Any]]:
    """The parts of one block, its norm placement, and the measurements behind the verdict.

    Args:
        block: The block.
        call: Arguments of a call of this block, as captured.
        width: Hidden size.
    """
    trial = Trial(block, call, width)
    parts = find_parts(block, trial.x, trial.trace, trial.norms)
    evidence: dict[str, Any] = {
        "norms_in_block": len(trial.norms),
        "attention_reads_a_norm": parts.attention_norm is not None,
        "mlp_reads_a_norm": parts.mlp_norm is not None,
    }
    last = next((n for n in trial.norms if same(trial.trace.outputs.get(n), trial.y)), None)
    evidence["block_returns_a_norms_output"] = last is not None
    if last is not None:
        placement, parts = _post_laws(trial, parts, last, evidence)
    else:
        placement = _residual_laws(trial, parts, evidence)
    return parts, placement, evidence
