from __future__ import annotations

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.models import drop_blocks, find_blocks, tiny_model
from preln.models.residual import as_tokens
from preln.prune import make_plan, score
from preln.prune.greedy import Part, Stack
from preln.prune.iterative import removal_order
from preln.prune.walk import walk

from .oracles import batch, column, greedy_blocks, order, stream

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom"])
def test_sleb_equals_brute_force_with_fresh_models(architecture):
    model, ids = tiny_model(architecture, blocks=5), batch()
    gone, rounds = greedy_blocks(model, ids, 3)
    found = score(model, ids, "sleb", size=3, batch_size=2)
    assert order(found, "sleb")[:3] == gone
    scores = column(found, "sleb")
    costs = [costs[k] for costs, k in zip(rounds, gone, strict=True)]
    np.testing.assert_allclose(scores[gone], np.maximum.accumulate(costs), rtol=1e-5)
    rest = [k for k in range(5) if k not in gone]
    np.testing.assert_allclose(scores[rest], np.maximum([rounds[-1][k] for k in rest], max(costs)), rtol=1e-5)
    # an identity: perplexity, one at a time, is the same greedy choice
    assert order(score(model, ids, "perplexity@1", size=3), "perplexity@1")[:3] == gone


def test_one_shot_is_not_greedy():
    """Negative control: on some model the two choose different sets."""
    ids = batch()
    sets = []
    for seed in range(8):
        found = score(tiny_model("gpt2", blocks=6, seed=seed), ids, ["sleb", "perplexity"], size=3)
        sets.append({m: set(order(found, m)[:3]) for m in ("sleb", "perplexity")})
    assert any(s["sleb"] != s["perplexity"] for s in sets)


def test_sleb_protects():
    model, ids = tiny_model("llama", blocks=5), batch()
    gone, _ = greedy_blocks(model, ids, 2, spared=(0, 4))
    found = score(model, ids, "sleb", size=2, protect="sleb")
    assert order(found, "sleb")[:2] == gone
    assert order(found, "sleb")[-2:] == [4, 0]
    assert make_plan(found, "sleb", drop=2, protect="sleb").drop == tuple(sorted(gone))


@pytest.mark.parametrize("metric", ["block_influence", "taylor", "angular", "first_order_damage"])
@pytest.mark.parametrize("step", [1, 2])
def test_iterative_equals_scoring_fresh_models(metric, step):
    model, ids = tiny_model("gpt2", blocks=6), batch()
    kept, gone = list(range(6)), []
    while len(gone) < 3:
        now = min(step, 3 - len(gone))
        small = drop_blocks(model, gone) if gone else model
        lowest = order(score(small, ids, metric, size=now), metric)[:now]
        gone += [kept[i] for i in lowest]
        kept = [k for k in kept if k not in gone]
    name = f"{metric}@{step}"
    found = score(model, ids, name, size=3, batch_size=2)
    assert order(found, name)[:3] == gone
    assert (np.diff(found.sort_values("rank")["score"]) >= 0).all()


@torch.no_grad()
def test_removal_runs_again_only_what_has_changed():
    model, ids = tiny_model("llama", blocks=5), batch()
    blocks, runs = find_blocks(model)[1], []
    stack = Stack([walk(model, blocks, as_tokens(ids))], [Part(k) for k in range(5)])
    for k, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda m, a, k=k: runs.append(k))
    stack.remove([3])
    assert runs == [4]
    runs.clear()
    final = stack.without(stack.walks[0], 1)
    assert runs == [2, 4]
    np.testing.assert_allclose(final, stream(drop_blocks(model, [1, 3]), ids)[-1], rtol=1e-4, atol=1e-5)


def test_order_and_scores_rise_together():
    found = removal_order([{0: 1.0, 1: 0.5, 2: 3.0}, {0: 0.2, 2: 0.1}], [[1], [2]], frozenset())
    assert list(found.order) == [1, 2, 0] and found.scores.tolist() == [0.5, 0.5, 0.5]
    spared = removal_order([{0: 1.0, 1: 0.5}], [[1]], frozenset({2}))
    assert list(spared.order) == [1, 0, 2] and spared.scores.tolist() == [1.0, 0.5, 1.0]


def test_what_cannot_be_done_is_one_line():
    model, ids = tiny_model("llama"), batch()
    for metrics, message in {
        "sleb@1": "by itself",
        "guess@2": "unknown",
        "block_influence@0": "unknown",
        "finercut": "score_halves",
        "llm_drop_mlp@1": "score_halves",
    }.items():
        with pytest.raises(InputError, match=message):
            score(model, ids, metrics)
    for size in (0, 4, 5, True):
        with pytest.raises(InputError, match="size"):
            score(model, ids, "sleb", size=size)
    with pytest.raises(InputError, match="leaves only 2"):
        score(model, ids, "sleb", size=3, protect="sleb")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        score(model, ids, "sleb")


def test_no_block_runs_oftener_than_it_must():
    """Counted, not timed: L(L + 1)/2 runs of blocks to leave each out, and as few for greedy rounds."""
    model, ids = tiny_model("gpt2", blocks=6), batch()
    runs = []
    for block in find_blocks(model)[1]:
        block.register_forward_hook(lambda *_: runs.append(1))
    score(model, ids, "perplexity")
    assert len(runs) == 6 * 7 // 2 + 1  # and once to see in which form a block returns its state
    runs.clear()
    first, second = order(score(model, ids, "sleb", size=2), "sleb")[:2]
    left = [k for k in range(6) if k != first]
    again = sum(k > first for k in left)
    assert first != second
    assert len(runs) == 6 + 6 * 5 // 2 + again + 5 * 4 // 2 + 1
    runs.clear()
    score(model, ids, "all")
    assert len(runs) == 6 * 7 // 2 + 1
