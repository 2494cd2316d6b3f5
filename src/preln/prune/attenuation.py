"""How much of a block's update the blocks after it may make of it: PRN-BOUND with measured norms."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from preln.base.errors import InputError
from preln.base.progress import track
from preln.linops import jacobian_operator, largest_singular_value
from preln.models import anatomy
from preln.models.maps import block_map, capture_calls, check_differentiable, hidden_input, run_block
from preln.models.placement import Call
from preln.models.precision import check_plain_weights, widen, widened
from preln.models.residual import as_tokens, undisturbed
from preln.prune.evidence import Array, Request
from preln.prune.registry import criterion

_SEQUENCES = 2
_RTOL, _PRODUCTS = 1e-2, 32


@criterion("attenuated_contribution", "jacobians", shared=False)
def attenuated_contribution(request: Request) -> Array:
    """``log |F_k(x_k)| + sum over j > k of log sigma(J_j)``, mean over the first sequences (PRN-BOUND).

    F_k is the update of block k on a whole sequence, J_j the Jacobian of block j at its own input there,
    both without padding. Dropping block k changes x[L] by at most ``|F_k| prod Lip_j`` with Lip_j a Lipschitz
    constant of block j on a set that holds both trajectories; with sigma(J_j) at the one point that is
    measured in its place, this is the bound to first order in the update. Logarithms cannot overflow, and do
    not change the order on one sequence.

    It takes some ten products with each block's Jacobian (Golub-Kahan-Lanczos to a residual of one per cent),
    many times what the other criteria cost, so it reads the first two sequences only.

    Raises:
        InputError: Quantised, compiled or fused layers, which have no second derivative, or values that are
            not finite.
    """
    model = request.model
    found = anatomy(model)
    check_plain_weights(model, found.blocks)
    check_differentiable(model, found)
    device = next(found.embedding.parameters()).device
    updates, sigmas = [], []
    with undisturbed(model):
        for ids, real in zip(request.tokens.ids[:_SEQUENCES], request.tokens.real[:_SEQUENCES], strict=True):
            # padding is left away, not masked: it would be part of the map
            part = as_tokens(ids[real][None].to(device))
            calls = capture_calls(model, found, part, check_stream=True)
            pairs = [
                _update_and_sigma(found.blocks[k], call, k)
                for k, call in enumerate(track(calls, label="jacobians", total=len(calls)))
            ]
            updates.append([update for update, _ in pairs])
            sigmas.append([sigma for _, sigma in pairs])
    logs = np.log(np.maximum(np.array(sigmas), np.finfo(float).tiny))
    after = np.cumsum(logs[:, ::-1], axis=1)[:, ::-1] - logs
    return (np.log(np.maximum(np.array(updates), np.finfo(float).tiny)) + after).mean(axis=0)


def _update_and_sigma(block: nn.Module, call: Call, index: int) -> tuple[float, float]:
    """|F(x)| and sigma(J) of one block on one sequence."""
    with widened([block]):
        call = widen(call)
        hidden = hidden_input(call)
        with torch.no_grad():
            size = float((run_block(block, call, hidden) - hidden).double().norm())
        if not np.isfinite(size):
            raise InputError(
                f"block {index}: values are not finite: check the weights, or use a wider --dtype"
            )
        operator = jacobian_operator(block_map(block, call), hidden, batch=1)
        triple = largest_singular_value(operator, rtol=_RTOL, max_products=_PRODUCTS)
    return size, float(triple.sigma)
