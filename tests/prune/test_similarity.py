from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.models import drop_blocks, tiny_model
from preln.prune import make_plan, score
from preln.prune.angles import angles
from preln.prune.similarity import best_windows

from .oracles import angle, batch, column, order, stream, sums, windows

pytestmark = pytest.mark.integration
WINDOWED = ["angular", "angular_all_tokens", "angular_sum"]


def by_definition(distances, size, count):
    """Least distance of any window that contains the block."""
    return [min(distances[s] for s in range(len(distances)) if s <= k < s + size) for k in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_equal_brute_force(architecture, size):
    model, ids = tiny_model(architecture, blocks=5), batch(3, 8)
    states = stream(model, ids)
    found = score(model, ids, WINDOWED, size=size, batch_size=2)
    expected = {
        "angular": windows(states, size, [-1]),
        "angular_all_tokens": windows(states, size),
        "angular_sum": sums(states, size, [-1]),
    }
    for metric, distances in expected.items():
        np.testing.assert_allclose(column(found, metric), by_definition(distances, size, 5), rtol=1e-5)
        start = int(np.argmin(distances))
        plan = make_plan(found, metric, drop=size)
        assert plan.drop == tuple(range(start, start + size))


def test_the_way_through_a_window_is_no_shorter_than_the_distance_across():
    model, ids = tiny_model("llama", blocks=6), batch()
    states = stream(model, ids)
    assert (sums(states, 3, [-1]) >= windows(states, 3, [-1]) - 1e-12).all()
    found = score(model, ids, WINDOWED, size=3)
    assert (column(found, "angular_sum") >= column(found, "angular") - 1e-6).all()


def test_protected_blocks_are_in_no_window():
    model, ids = tiny_model("gpt2", blocks=6), batch()
    distances = windows(stream(model, ids), 2, [-1])
    found = score(model, ids, "angular", size=2, protect="sleb")
    start = 1 + int(np.argmin(distances[1:4]))
    assert make_plan(found, "angular", drop=2, protect="sleb").drop == (start, start + 1)
    assert {0, 5} == set(order(found, "angular")[-2:])
    with pytest.raises(InputError, match="no 2 neighbouring"):
        best_windows(np.ones(3), 2, 4, frozenset({1, 2}), "angular")


@given(
    distances=st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=8),
    size=st.integers(1, 4),
    spared=st.sets(st.integers(0, 11), max_size=3),
)
def test_the_best_free_window_goes_first(distances, size, spared):
    count = len(distances) + size - 1
    spared = frozenset(s for s in spared if s < count)
    free = [s for s in range(len(distances)) if not spared & set(range(s, s + size))]
    if not free:
        with pytest.raises(InputError, match="neighbouring"):
            best_windows(np.array(distances), size, count, spared, "angular")
        return
    found = best_windows(np.array(distances), size, count, spared, "angular")
    first = sorted(found.order[:size])
    assert first == list(range(first[0], first[0] + size))
    assert distances[first[0]] == min(distances[s] for s in free)
    assert not spared & set(first)
    assert sorted(found.order) == list(range(count))
    assert (np.diff(found.scores[list(found.order)]) >= 0).all()


@pytest.mark.parametrize("turn", [1e-1, 1e-3, 1e-6])
def test_small_angles_keep_their_digits_and_arccos_in_bfloat16_loses_them(turn):
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    across = other - (other * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x
    y = x + math.tan(turn) * across * (x.norm(dim=-1) / across.norm(dim=-1))[..., None]
    expected = torch.full((1, 4), turn / math.pi, dtype=torch.float64)
    torch.testing.assert_close(angles(x, y), expected, rtol=1e-7, atol=0)
    np.testing.assert_allclose(angle(x.numpy(), y.numpy()), expected, rtol=1e-7)
    torch.testing.assert_close(
        angles(x.float(), y.float()), expected.float(), rtol=max(1e-5, 1e-6 / turn), atol=0
    )
    low = [v.bfloat16() for v in (x, y)]
    cosine = torch.nn.functional.cosine_similarity(*low, dim=-1).clamp(-1, 1)
    lossy = torch.arccos(cosine.float()) / math.pi
    assert (lossy - expected).abs().max() > 0.05 * turn / math.pi


def test_zero_states_count_as_a_right_angle():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert angles(zero, one).item() == angles(zero, zero).item() == 0.5
    assert angles(one, one).item() == 0.0 and angles(one, -one).item() == 1.0


def test_a_chosen_window_can_be_cut():
    model, ids = tiny_model("llama", blocks=4), batch()
    plan = make_plan(score(model, ids, "angular", size=2), "angular", drop=2)
    assert drop_blocks(model, plan.drop).config.num_hidden_layers == 2
