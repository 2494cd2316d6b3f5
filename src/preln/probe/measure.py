"""One forward and one backward pass for each sequence batch, and every measure from them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.base.journal import SECONDS as CHECKPOINT_SECONDS
from preln.base.progress import track
from preln.base.provenance import now, provenance
from preln.data import fingerprint
from preln.models import anatomy
from preln.models.residual import as_tokens, undisturbed
from preln.probe.gradients import MIN_UNITS, Squares
from preln.probe.jacobians import jacobian_tables
from preln.probe.measures import JACOBIAN, choose
from preln.probe.passes import Passes
from preln.probe.plan import Plan
from preln.probe.sums import COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        layers: measure, layer, site, statistic, value, low, high, n, dtype, attn_implementation. n counts
            the units that the 95 % bootstrap interval resamples: sequences, or for the parameters' gradients
            sequence batches (runs of them where there are more than 64).
        pairs: start, size, angular_distance, angular_distance_last_token (angles over pi) with intervals;
            None if left out.
        sequences: measure, layer, site, statistic, sequence, value: each number from one sequence alone.
        resamples: measure, site, layer, draw, value: ``grad_param`` of every block, final norm and head, in
            the same bootstrap samples for all blocks; None where it was not taken or could not be resampled.
        manifest: Provenance, dtype, attention implementation, placement, token fingerprint, notes.
    """

    layers: pd.DataFrame
    pairs: pd.DataFrame | None
    sequences: pd.DataFrame
    manifest: dict[str, Any]
    resamples: pd.DataFrame | None = None


def _run(plan: Plan, resume: str | os.PathLike[str] | None) -> tuple[Passes, Squares]:
    """All passes, but those that a former run stored in ``resume``, and the parameters' gradients."""
    tokens = plan.tokens
    parts = list(tokens.batches(plan.batch_size, _device(plan)))
    passes = Passes(
        plan.model,
        plan.found,
        plan.wanted,
        pairs=plan.pairs,
        batches=len(parts),
        total=int(tokens.targets.sum()),
        intervals=plan.bootstrap > 0 and len(parts) >= MIN_UNITS,
        seed=plan.seed,
    )
    checkpoints, started = None, time.monotonic()
    with passes.attached():
        if resume is not None and Path(resume).is_dir():
            checkpoints = Checkpoints(resume, plan.identity())
            stored = checkpoints.latest()
            if stored is not None:
                passes.restore(stored)
        left = parts[passes.done :]
        for part in track(left, label="probe", total=len(left)):
            passes.take(part)
            due = time.monotonic() - started > CHECKPOINT_SECONDS
            # with Jacobians to come the passes are not the end
            due = due or bool(passes.done == len(parts) and plan.wanted & set(JACOBIAN))
            if resume is not None and due:
                checkpoints = checkpoints or Checkpoints(resume, plan.identity())
                passes.save(checkpoints)
                started = time.monotonic()
        # before the gradients go with the context
        return passes, passes.gradients.squares(draws=plan.bootstrap, seed=plan.seed)


def _jacobians(plan: Plan, resume: str | os.PathLike[str] | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of the Jacobian norms, batches of which a former run may have stored in ``resume``."""
    checkpoints = None
    if resume is not None:
        checkpoints = Checkpoints(Path(resume) / "jacobians", plan.identity(jacobians=True))
    few = next(plan.tokens.batches(min(plan.jacobian_sequences, len(plan.tokens.ids)), _device(plan)))
    norms, values = jacobian_tables(
        plan.model,
        plan.found,
        few,
        plan.wanted,
        seed=plan.seed,
        draws=plan.bootstrap,
        checkpoints=checkpoints,
    )
    wide = "float64" if plan.dtype == "float64" else "float32"
    labelled = _labelled([norms], wide, _twice_differentiable(plan.attention))
    labelled.attrs["left_out"] = norms.attrs["left_out"]
    return labelled, values


def probe_tables(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    measures: Iterable[str] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    bootstrap: int = 1000,
    pairs: bool = True,
    jacobian_sequences: int = 2,
    resume: str | os.PathLike[str] | None = None,
) -> ProbeResult:
    """Measure a model on tokens: per-layer table, angular distances, per-sequence values, manifest.

    x[l] is the input of block l and x[L] the last block's output before the final norm; layer l of a row is
    the block, or the index of the state where a measure is one of states. L is the mean next-token loss in
    nats over all targets. Tokens that the mask hides are in no mean. ``mean_without_first_token`` leaves
    out each sequence's first real token, which often carries most of the norm.

    The model is left as it was: modes, ``requires_grad``, ``.grad``, hooks.

    Args:
        model: A causal model.
        batch: Token ids.
        attention_mask: 1 for real tokens; None if all are.
        measures: Names from :data:`preln.probe.MEASURES`, of its groups (stream, updates, gradients, norms,
            jacobians, lens), or ``all``; None takes the first four groups as far as the model allows.
        batch_size: Sequences in one pass; the numbers do not depend on it, but the intervals of the
            parameters' gradients resample sequence batches, and there are none with fewer than four.
        seed: Fixes the bootstrap.
        bootstrap: Number of bootstrap samples; 0 leaves intervals out.
        pairs: Whether to take the angular distances of all pairs of states.
        jacobian_sequences: How many of the sequences, from the first, the Jacobian norms are taken on.
        resume: Folder for checkpoints while the passes last, written once a minute; the same call goes on
            from them after a kill, to the same numbers. The caller removes it.

    Raises:
        InputError: Bad tokens, unknown measures, measures that the model does not allow, values that are
            not finite (naming block and site), a norm that no formula reproduces, checkpoints of another run.
    """
    begun = provenance()
    tokens = as_tokens(batch, attention_mask)
    if jacobian_sequences < 1:
        raise InputError(f"jacobian_sequences {jacobian_sequences}: use at least 1")
    with undisturbed(model):
        found = anatomy(model)
    wanted, notes = choose(measures, found)
    plan = Plan(model, found, tokens, wanted, notes, batch_size, seed, bootstrap, pairs, jacobian_sequences)
    passes, squares = _run(plan, resume)
    frames = [passes.sums.table(draws=bootstrap, seed=seed), squares.table(wanted)]
    layers = _labelled(frames, plan.dtype, plan.attention)
    sequences = passes.sums.sequences()
    if wanted & set(JACOBIAN):
        norms, values = _jacobians(plan, resume)
        notes.extend(norms.attrs["left_out"])
        layers, sequences = _below(layers, norms), _below(sequences, values)
    layers = layers.sort_values(["measure", "site", "statistic", "layer"], ignore_index=True)
    manifest = begun | {
        "model": _name(model),
        "num_blocks": found.num_blocks,
        "placement": found.placement,
        "dtype": plan.dtype,
        "attn_implementation": plan.attention,
        "device": str(_device(plan)),
        "tokens": {
            "fingerprint": fingerprint(batch),
            "sequences": batch.shape[0],
            "real": int(tokens.real.sum()),
            "targets": passes.total,
        },
        "loss": float(passes.losses.sum() / passes.total),
        "seed": seed,
        "bootstrap": bootstrap,
        "batch_size": batch_size,
        "jacobian_sequences": min(jacobian_sequences, len(batch)) if wanted & set(JACOBIAN) else 0,
        "notes": notes,
        "end": now(),
    }
    for key in ("dtype", "attn_implementation", "placement", "notes", "loss"):
        layers.attrs[key] = manifest[key]
    found_pairs = None
    if passes.pairs is not None:
        found_pairs = _labelled([passes.pairs.table(draws=bootstrap, seed=seed)], plan.dtype, plan.attention)
    return ProbeResult(layers, found_pairs, sequences, manifest, _resamples(squares))


def probe(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    measures: Iterable[str] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    bootstrap: int = 1000,
    jacobian_sequences: int = 2,
) -> pd.DataFrame:
    """The per-layer table of :func:`probe_tables`; ``attrs`` hold dtype, attention, placement, notes."""
    result = probe_tables(
        model,
        batch,
        attention_mask=attention_mask,
        measures=measures,
        batch_size=batch_size,
        seed=seed,
        bootstrap=bootstrap,
        pairs=False,
        jacobian_sequences=jacobian_sequences,
    )
    return result.layers


def _device(plan: Plan) -> torch.device:
    return next(plan.found.embedding.parameters()).device


def _labelled(frames: list[pd.DataFrame], dtype: str, attention: str) -> pd.DataFrame:
    """The non-empty tables one below the other, every row with its dtype and attention implementation."""
    kept = [frame for frame in frames if len(frame)]
    whole = pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=COLUMNS)
    return whole.assign(dtype=dtype, attn_implementation=attention)


def _below(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Two tables one below the other; an empty one, whose columns have no types, would take those away."""
    return pd.concat([first, second], ignore_index=True) if len(first) else second.reset_index(drop=True)


def _twice_differentiable(attention: str) -> str:
    """What the Jacobian products run: the fused kernels behind ``sdpa`` have no second derivative."""
    return "sdpa_math" if attention == "sdpa" else attention


def _name(model: PreTrainedModel) -> str:
    """The model's own name: a hub id as it is, of a local path the last part only."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() or name.startswith("/") else name


def _resamples(squares: Squares) -> pd.DataFrame | None:
    """The bootstrap samples of ``grad_param`` of blocks, final norm and head, as a tidy table."""
    sites = sorted(key for key in squares.sites if key[1] in ("block", "final_norm", "head"))
    if not squares.resampled.size or not sites:
        return None
    values = [squares.samples(*key) for key in sites]
    tables = [
        pd.DataFrame(
            {"measure": "grad_param", "site": site, "layer": layer, "draw": range(len(v)), "value": v}
        )
        for (layer, site), v in zip(sites, values, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)
