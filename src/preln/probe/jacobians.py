"""Spectral norms of the Jacobians of real blocks, branches and stacks, the theory's bounds beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from preln.base.checkpoints import Checkpoints
from preln.base.errors import InputError
from preln.base.progress import track
from preln.models import Anatomy
from preln.models.maps import check_differentiable
from preln.models.precision import check_plain_weights
from preln.models.residual import Tokens, undisturbed
from preln.probe.block_spectra import JacobianProbe
from preln.probe.measures import JACOBIAN
from preln.probe.spectra import Lanczos

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def jacobian_tables(
    model: PreTrainedModel,
    found: Anatomy,
    tokens: Tokens,
    wanted: set[str],
    *,
    batch_size: int = 1,
    rtol: float = 1e-3,
    max_products: int = 64,
    seed: int = 0,
    draws: int = 1000,
    bounds: bool = True,
    checkpoints: Checkpoints | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spectral norms of Jacobians on whole sequences, their evidence, and the theory's bounds.

    Block l maps x[l] to x[l+1], both ``[T, d]`` a sequence; J is its Jacobian, A that of a branch with
    respect to its norm's output (to its input where no norm stands in front), G that of a norm. On padded
    sequences all of them are restricted to the real tokens on both sides, P J P. Every product with J goes
    through the model's own modules, in float32 (half-precision blocks are converted in place and put back
    bit by bit) or float64.

    Measures, sites and what stands beside each, every one a mean over sequences:

    - ``branch_sigma``: attention, mlp (block: both behind one shared norm): sigma(A).
    - ``update_sigma``: attention, mlp: sigma of the half's update, A G (G2 A G1 in a sandwich, G A with the
      norm behind the branch, none in Post-LN); block: sigma(J - I).
    - ``block_sigma``: sigma(J).
    - ``block_sigma_min``: the smallest Ritz value of the same bidiagonalisation, which goes on for it until
      it has converged or ``max_products`` are spent: an upper bound of the smallest singular value of J.
      Its ``_bound`` is a lower bound: the larger of the placement's claim, for Pre-LN
      max(0, 1 - a1 g1) max(0, 1 - a2 g2), and Weyl's max(0, 1 - sigma(J - I)) on sequences where
      ``update_sigma`` was asked for and converged. Its ``_residual`` is relative to the Ritz value itself
      (to 1e-12 of sigma(J) where that is larger), so a value that has not converged shows a large one.
    - ``stack_sigma``, layer l: sigma of x[l] -> x[L], L before the final norm. ``stack_sigma_bound``
      multiplies the blocks' bounds, ``stack_sigma_product`` the measured sigma(J) (both cut off at 1e300);
      ``stack_sigma_log10_overestimate`` is log10(bound/value), from sums of logarithms.
    - ``X_residual``: residual of the singular triple over sigma; ``X_products``: product pairs it took;
      ``X_bound`` and ``X_tightness``, value over bound (bound over value for ``block_sigma_min``), 1 where
      both are 0.
    - ``branch_decomposition_error``, block: ``|J v - v'|/|J v|`` for a random v, v' from the branches and
      norms put together as the measured placement says. Above 1e-3 the placement does not describe the
      block: its branches and bounds are left out, and ``attrs["left_out"]`` of the first table says so.

    Bounds are the claims BLK-PRE, BLK-PARALLEL, BLK-SANDWICH, BLK-AFTER, BLK-POST (by the block's
    placement) and STK-UPPER, with a = sigma(A) plus its residual (a Ritz value alone lies too low) and g
    the largest exact sigma of a norm over the sequence's real tokens. They hold as far as the residuals are
    small.

    One block's graphs exist at a time; for ``stack_sigma`` those of all blocks do (about L times the memory
    of one block's backward pass), with a basis of up to ``4 k`` vectors ``[b, T, d]`` for k product pairs.

    Args:
        model: A causal model; left as it was, errors included.
        found: Its anatomy.
        tokens: The sequences; all of them are measured.
        wanted: At least one name from `preln.probe.measures.JACOBIAN`; other measures are passed over.
        batch_size: Sequences at a time; values do not depend on it beyond rounding.
        rtol: Relative residual at which an iteration stops.
        max_products: Most product pairs for one value; the residual shows where they ran out.
        seed: Fixes start vectors and bootstrap.
        draws: Bootstrap samples for the intervals.
        bounds: False leaves out bounds, and the branches that only they need.
        checkpoints: Where every finished batch is stored, and from where a stopped run goes on.

    Returns:
        Two tables as those of :func:`preln.probe.probe_tables`: layers and sequences.

    Raises:
        InputError: None of these measures; quantised, compiled or fused layers, which have no second
            derivative; for ``stack_sigma`` a model that changes the stream between blocks; values that are
            not finite.
    """
    own = wanted & set(JACOBIAN)
    if not own:
        raise InputError(f"no measure of Jacobians asked for: choose from {', '.join(JACOBIAN)}")
    check_plain_weights(model, found.blocks)
    check_differentiable(model, found)
    device = next(found.embedding.parameters()).device
    probe = JacobianProbe(model, found, own, Lanczos(rtol, max_products, seed), bounds=bounds)
    parts = list(tokens.batches(batch_size, device))
    stored = None if checkpoints is None else checkpoints.latest()
    if stored is not None:
        probe.restore(stored)
    with undisturbed(model):
        for part in track(parts[probe.done :], label="jacobians", total=len(parts) - probe.done):
            probe.batch(part)
            if checkpoints is not None:
                probe.save(checkpoints)
    layers, sequences = probe.sums.table(draws=draws, seed=seed), probe.sums.sequences()
    layers.attrs["left_out"] = [f"block {i}: {reason}" for i, reason in probe.left_out.items()]
    return layers, sequences
