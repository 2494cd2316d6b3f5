"""Merging: LaCo, the sliding window and MKA, against their formulas written out slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.models import find_blocks, tiny_model
from preln.prune.replace import replace_blocks
from preln.prune.replace.merging import add_differences, likeness, merge, merged_weights, single_blocks
from preln.prune.replace.mka import block_outputs, diffusion_map, mutual_information, similarity_matrix
from preln.prune.replace.sliding_merge import slide

pytestmark = pytest.mark.integration
BATCH = torch.randint(1, 512, (6, 14), generator=torch.Generator().manual_seed(0))
MODELS = ["llama", "gpt2", "gemma2"]


def weights(model):
    return [{k: p.detach().double() for k, p in b.named_parameters()} for b in find_blocks(model)[1]]


def the_group(plan):
    """The merged groups that a plan names, as lists of blocks."""
    return [[int(i) for i in group.split("+")] for group in plan.settings["merged"].split()]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", ["laco", "sliding_merge"])
def test_differences_are_taken_from_the_first_block(architecture, method):
    model = tiny_model(architecture, blocks=6)
    own = weights(model)
    small, plan = replace_blocks(model, BATCH, method, drop=2)
    merged = weights(small)
    assert len(merged) == 4 == len(plan.keep)
    for kept, found in zip(plan.keep, merged, strict=True):
        group = next((g for g in the_group(plan) if g[0] == kept), [kept])
        for name, value in found.items():
            expected = own[kept][name].clone()
            for other in group[1:]:
                expected += own[other][name] - own[kept][name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(own, weights(model), strict=True) for k in a)


def test_negative_control_adding_to_the_changed_block_ends_in_the_top_layer():
    """Published code takes each difference from the sum so far: only the last block is left."""
    model = tiny_model("llama", blocks=4)
    own = weights(model)
    group = add_differences(single_blocks(4)[1:4])
    with merged_weights(find_blocks(model)[1], [{0: 1.0}, group]):
        merged = weights(model)[1]
    for name, start in own[1].items():
        published = start.clone()
        for other in (2, 3):
            published += own[other][name] - published
        torch.testing.assert_close(published, own[3][name])  # the collapse
        assert not torch.allclose(merged[name], published, atol=1e-3)


def test_weights_are_back_after_a_trial_and_likeness_of_nothing_is_one():
    model = tiny_model("llama")
    own = weights(model)
    similarity = likeness(model, BATCH)
    assert similarity(single_blocks(4)) == pytest.approx(1.0, abs=1e-6)
    groups = [{0: 1.0}, add_differences(single_blocks(4)[1:3]), {3: 1.0}]
    by_view = similarity(groups)
    small = merge(model, groups)
    states = []
    for each in (model, small):
        seen = []
        handle = each.lm_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            each(BATCH, use_cache=False)
        handle.remove()
        states.append(seen[0].double().flatten(0, 1))
    slow = torch.nn.functional.normalize(states[0], dim=-1) * torch.nn.functional.normalize(states[1], dim=-1)
    assert by_view == pytest.approx(float(slow.sum(-1).mean()), abs=1e-6)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(own, weights(model), strict=True) for k in a)


def test_what_was_measured_once_is_not_measured_again():
    model, runs = tiny_model("llama"), []
    handle = model.lm_head.register_forward_pre_hook(lambda *_: runs.append(1))
    similarity = likeness(model, BATCH)
    nested = [{0: 1.0}, {1: -1.0, 2: 1.0, 3: 1.0}]
    other = [{0: 1.0}, {1: 0.0, 2: 0.0, 3: 1.0}]  # the same blocks, other weights
    before = len(runs)
    first = similarity(nested)
    once = len(runs) - before
    assert similarity(nested) == first and len(runs) - before == once > 0
    assert similarity(other) != first and len(runs) - before == 2 * once
    handle.remove()


def test_laco_follows_its_algorithm_written_out():
    """Every accepted merge exceeds the threshold in force, and the first window is the deepest."""
    model = tiny_model("gpt2", blocks=8)
    _, plan = replace_blocks(model, BATCH, "laco", drop=4, size_of_merge=3, interval=1, threshold=-2)
    # everything is accepted: windows of three, from the deepest up, on the model merged so far
    groups, place = [[i] for i in range(8)], 5
    while 8 - len(groups) < 4:
        extra = min(2, 4 - (8 - len(groups)))
        groups[place : place + extra + 1] = [[i for g in groups[place : place + extra + 1] for i in g]]
        place = min(place - 1, len(groups) - 3)
    assert the_group(plan) == [g for g in groups if len(g) > 1]
    assert plan.drop == tuple(i for g in groups for i in g[1:])


def test_the_window_slides_as_written():
    accepted = {"4+5", "3+4+5", "0+1"}

    def accept(groups):
        from preln.prune.replace.merging import written

        last = next(g for g in groups if len(g) > 1)
        return written([last]) in accepted

    groups = slide(6, 5, set(), accept)
    assert [sorted(g) for g in groups] == [[0, 1], [2], [3, 4, 5]]
    assert [sorted(g) for g in slide(6, 1, set(), accept)] == [[0], [1], [2], [3], [4, 5]]
    assert groups[-1] == {3: -1.0, 4: 1.0, 5: 1.0}  # theta_3 + (theta_4 - theta_3) + (theta_5 - theta_3)
    assert [sorted(g) for g in slide(6, 5, {4}, lambda _: True)] == [[0, 1, 2, 3], [4], [5]]


@pytest.mark.parametrize("method", ["laco", "sliding_merge", "mka"])
def test_protected_blocks_neither_go_nor_change(method):
    model = tiny_model("llama", blocks=6)
    settings = {"size_of_merge": 2} if method == "laco" else {}
    small, plan = replace_blocks(model, BATCH, method, drop=2, protect="sleb", **settings)
    assert not {0, 5} & {i for g in the_group(plan) for i in g}
    for index in (0, -1):
        a, b = weights(model)[index], weights(small)[index]
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(InputError, match=method):
        replace_blocks(model, BATCH, method, drop=4, protect="sleb", **settings)


@pytest.mark.parametrize("architecture", MODELS)
def test_mka_averages_the_most_similar_neighbours(architecture):
    model = tiny_model(architecture, blocks=5)
    own = weights(model)
    small, plan = replace_blocks(model, BATCH, "mka", drop=1)
    similar = similarity_matrix(block_outputs(model, BATCH, 512, 0), 2)
    low = max(range(4), key=lambda k: similar[k, k + 1])
    assert plan.drop == (low + 1,)
    a = similar[low, low + 1]
    found = weights(small)[low]
    for name, value in found.items():
        torch.testing.assert_close(
            value, a * own[low][name] + (1 - a) * own[low + 1][name], rtol=1e-6, atol=1e-6
        )
    # negative control: in published code the lower block keeps its weights, so that nothing is merged
    assert not all(torch.allclose(value, own[low][name], atol=1e-6) for name, value in found.items())


def test_mka_merges_on_from_what_is_merged():
    model = tiny_model("llama", blocks=4)
    own = weights(model)
    small, plan = replace_blocks(model, BATCH, "mka", drop=3)
    similar = similarity_matrix(block_outputs(model, BATCH, 512, 0), 2)
    groups = [({k: own[0][k] * 0 + w[k] for k in w}, i) for i, w in enumerate(own)]
    while len(groups) > 1:
        best = max(range(len(groups) - 1), key=lambda k: similar[groups[k][1], groups[k + 1][1]])
        (one, i), (two, j) = groups[best : best + 2]
        a = similar[i, j]
        groups[best : best + 2] = [({k: a * one[k] + (1 - a) * two[k] for k in one}, j)]
    assert plan.drop == (1, 2, 3)
    for name, value in weights(small)[0].items():
        torch.testing.assert_close(value, groups[0][0][name], rtol=1e-5, atol=1e-6)


def test_diffusion_coordinates_are_eigenvectors_of_the_markov_matrix():
    """The slow way: eigenvectors of the unsymmetric matrix itself, by another routine."""
    points = np.random.default_rng(0).normal(size=(30, 4))
    distance = np.array([[np.sum((p - q) ** 2) for q in points] for p in points])
    kernel = np.exp(-distance / np.median(distance[np.triu_indices(30, 1)]))
    density = kernel.sum(1)
    kernel = kernel / np.sqrt(density[:, None] * density[None, :])
    markov = kernel / kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(markov.sum(1), 1.0)
    values = np.sort(np.linalg.eigvals(markov).real)[::-1]
    found = diffusion_map(points, 3)
    for k in range(3):
        np.testing.assert_allclose(markov @ found[:, k], values[k + 1] * found[:, k], atol=1e-10)
        assert np.abs(found[:, k]).max() > 1e-3


def test_mutual_information_is_that_of_normal_variables():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1))
    for rho in (0.0, 0.5, 0.9):
        y = rho * x + np.sqrt(1 - rho**2) * noise
        expected = -0.5 * np.log(1 - rho**2)
        assert mutual_information(x, y) == pytest.approx(expected, abs=0.03)
        assert mutual_information(np.exp(x), y**3) == mutual_information(x, y)  # of ranks alone
    assert mutual_information(x, x) == float("inf")
    two = rng.normal(size=(200, 2))
    assert mutual_information(two, two @ [[0.0, -1.0], [1.0, 0.0]]) > 5  # a turned copy knows all of it


def test_similarities_are_symmetric_and_at_most_one():
    model = tiny_model("llama")
    similar = similarity_matrix(block_outputs(model, BATCH, 64, 0), 2)
    np.testing.assert_array_equal(similar, similar.T)
    np.testing.assert_array_equal(np.diag(similar), 1.0)
    assert ((similar >= 0) & (similar <= 1)).all()
    with pytest.raises(InputError, match="tokens are too few"):
        replace_blocks(model, BATCH[:1, :6], "mka", drop=1)
