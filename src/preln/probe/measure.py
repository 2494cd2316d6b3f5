"""One forward and one backward pass for each sequence batch, and every measure from them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.progress import track
from preln.base.provenance import provenance
from preln.data import fingerprint
from preln.models import anatomy
from preln.models.residual import as_tokens, forward_losses, undisturbed
from preln.probe.collect import Collector
from preln.probe.gradients import MIN_BATCHES, GradientSums
from preln.probe.measures import GRADIENT, PARAMETER, choose
from preln.probe.pairs import PairSums
from preln.probe.sums import COLUMNS, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        layers: measure, layer, site, statistic, value, low, high, n. n counts the units that the 95 %
            bootstrap interval resamples: sequences, or sequence batches for ``grad_param``.
        pairs: start, size, angular_distance, angular_distance_last_token (angles over pi); None if left out.
        sequences: measure, layer, site, statistic, sequence, value: each number from one sequence alone.
        resamples: measure, layer, draw, value: ``grad_param`` in every bootstrap sample of sequence batches,
            the same samples for all blocks; None where it was not taken or could not be resampled.
        manifest: Provenance, dtype, attention implementation, placement, token fingerprint, notes.
    """

    layers: pd.DataFrame
    pairs: pd.DataFrame | None
    sequences: pd.DataFrame
    manifest: dict[str, Any]
    resamples: pd.DataFrame | None = None


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
) -> ProbeResult:
    """Measure a model on tokens: per-layer table, angular distances, per-sequence values, manifest.

    x[l] is the input of block l and x[L] the last block's output before the final norm; layer l of a row is
    the block, or the index of the state for ``residual_rms`` and ``grad_hidden``. L is the mean next-token
    loss in nats over all targets. Tokens that the mask hides are in no mean. ``mean_without_first_token``
    leaves out each sequence's first real token, which often carries most of the norm.

    The model is left as it was: modes, ``requires_grad``, ``.grad``, hooks.

    Args:
        model: A causal model.
        batch: Token ids.
        attention_mask: 1 for real tokens; None if all are.
        measures: Names from :data:`preln.probe.MEASURES`; None takes all that the model allows.
        batch_size: Sequences in one pass; the numbers do not depend on it, but the interval of
            ``grad_param`` resamples sequence batches, and there is none with fewer than four.
        seed: Fixes the bootstrap.
        bootstrap: Number of bootstrap samples; 0 leaves intervals out.
        pairs: Whether to take the angular distances of all pairs of states.

    Raises:
        InputError: Bad tokens, unknown measures, Pre-LN measures asked of another placement, values that are
            not finite (naming block and site), a norm that no formula reproduces.
    """
    tokens = as_tokens(batch, attention_mask)
    with undisturbed(model):
        found = anatomy(model)
    wanted, notes = choose(measures, found)
    gradients = bool(wanted & {*GRADIENT, *PARAMETER})
    sums = Sums()
    collector = Collector(
        found,
        wanted,
        sums,
        PairSums(found.num_blocks) if pairs else None,
        width=model.config.get_text_config().hidden_size,
    )
    passes = list(tokens.batches(batch_size, next(found.embedding.parameters()).device))
    blocks = found.blocks if wanted & set(PARAMETER) else []
    gradient_sums = GradientSums(blocks, sketch=bool(bootstrap) and len(passes) >= MIN_BATCHES, seed=seed)
    trained = [p for group in gradient_sums.groups for p in group]
    # gradients are taken of sum/total, the loss itself, so that half precision keeps its range
    total = int(tokens.targets.sum())
    losses: list[Tensor] = []
    with undisturbed(model, trained), ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        stack.enter_context(collector.attached(gradients=gradients))
        for part in track(passes, label="probe", total=len(passes)):
            collector.start(part, float(total))
            summed = forward_losses(model, part)
            if not bool(torch.isfinite(summed).all()):
                raise InputError("head: the loss is not finite: check the weights, or use a wider --dtype")
            losses.append(summed.detach().sum(1).cpu())
            if gradients:
                (summed.sum() / total).backward(inputs=[collector.leaf, *trained])
                gradient_sums.after_batch(int(part.targets.sum()))
            collector.finish()
        extra = gradient_sums.rows(1.0, draws=bootstrap, seed=seed)
    layers = pd.concat(
        [f for f in (sums.table(draws=bootstrap, seed=seed), pd.DataFrame(extra, columns=COLUMNS)) if len(f)],
        ignore_index=True,
    ).sort_values(["measure", "site", "statistic", "layer"], ignore_index=True)
    manifest = provenance(
        model=_name(model),
        num_blocks=found.num_blocks,
        placement=found.placement,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        attn_implementation=str(getattr(model.config, "_attn_implementation", None)),
        device=str(next(found.embedding.parameters()).device),
        tokens={
            "fingerprint": fingerprint(batch),
            "sequences": batch.shape[0],
            "real": int(tokens.real.sum()),
            "targets": total,
        },
        loss=float(torch.cat(losses).double().sum() / total),
        seed=seed,
        bootstrap=bootstrap,
        batch_size=batch_size,
        notes=notes,
    )
    for key in ("dtype", "attn_implementation", "placement", "notes", "loss"):
        layers.attrs[key] = manifest[key]
    found_pairs = collector.pairs.table() if collector.pairs is not None else None
    return ProbeResult(layers, found_pairs, sums.sequences(), manifest, _resamples(gradient_sums.resampled))


def probe(
    model: PreTrainedModel,
    batch: Int[Tensor, "n t"],
    *,
    attention_mask: Int[Tensor, "n t"] | None = None,
    measures: Iterable[str] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    bootstrap: int = 1000,
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
    )
    return result.layers


def _name(model: PreTrainedModel) -> str:
    """The model's own name: a hub id as it is, of a local path the last part only."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() or name.startswith("/") else name


def _resamples(values: npt.NDArray[np.float64]) -> pd.DataFrame | None:
    """The bootstrap samples of ``grad_param``, ``[L, draws]``, as a tidy table."""
    if not values.size:
        return None
    layers, draws = np.indices(values.shape)
    columns = {"layer": layers.ravel(), "draw": draws.ravel(), "value": values.ravel()}
    return pd.DataFrame({"measure": "grad_param", **columns})
