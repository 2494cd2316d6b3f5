from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from preln.models import drop_blocks, find_blocks, tiny_model
from preln.prune import score

from .oracles import batch, column, stream

pytestmark = pytest.mark.integration


def dense(model, ids):
    """log |F_k| + sum of log sigma(J_j) with every Jacobian written out, block by block, for one sequence."""
    blocks, updates, sigmas = find_blocks(model)[1], [], []
    calls = []
    handles = [
        b.register_forward_pre_hook(lambda m, a, k: calls.append((m, a, k)), with_kwargs=True) for b in blocks
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for block, args, kwargs in calls:
        x, named = (args[0], kwargs) if args else (kwargs["hidden_states"], kwargs)

        def run(h, block=block, args=args, named=named):
            out = block(h, *args[1:], **named) if args else block(**{**named, "hidden_states": h})
            return out if isinstance(out, torch.Tensor) else out[0]

        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(run, x.detach()).reshape(x.numel(), x.numel())
        updates.append(math.log((run(x) - x).detach().norm().item()))
        sigmas.append(math.log(torch.linalg.matrix_norm(jacobian.double(), 2).item()))
    return np.array([u + sum(sigmas[k + 1 :]) for k, u in enumerate(updates)])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_bound_equals_dense_jacobians(architecture):
    model, ids = tiny_model(architecture, blocks=3), batch(3, 4)
    expected = (dense(model, ids[:1]) + dense(model, ids[1:2])) / 2
    found = column(score(model, ids, "attenuated_contribution"), "attenuated_contribution")
    np.testing.assert_allclose(found, expected, atol=2e-3)
    # the last block is followed by nothing: its bound is what dropping it does
    last = []
    for row in ids[:2]:
        whole = stream(model, row[None])
        last.append(math.log(np.linalg.norm(whole[-1] - whole[-2])))
    assert found[-1] == pytest.approx(np.mean(last), abs=1e-5)


def test_the_bound_is_not_the_update_alone():
    """Negative control: without the blocks behind it, the order of the contributions is another."""
    orders = []
    for seed in range(4):
        model, ids = tiny_model("gpt2", blocks=4, seed=seed), batch(1, 4)
        flow = stream(model, ids)
        updates = [math.log(np.linalg.norm(y - x)) for x, y in itertools.pairwise(flow)]
        found = column(score(model, ids, "attenuated_contribution"), "attenuated_contribution")
        orders.append((np.argsort(updates).tolist(), np.argsort(found).tolist()))
        assert not np.allclose(found[:-1], updates[:-1], atol=1e-2)
    assert any(plain != bound for plain, bound in orders)


def test_a_small_update_moves_the_output_by_no_more_than_the_bound():
    """To first order in the update: scale one block's branches down until it is small."""
    model, ids = tiny_model("llama", blocks=4), batch(1, 5)
    block = find_blocks(model)[1][1]
    with torch.no_grad():
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.mul_(1e-3)
    bound = column(score(model, ids, "attenuated_contribution"), "attenuated_contribution")[1]
    moved = stream(drop_blocks(model, [1]), ids)[-1] - stream(model, ids)[-1]
    assert np.linalg.norm(moved) <= 1.01 * math.exp(bound)
