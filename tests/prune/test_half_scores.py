from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.models import find_blocks, tiny_model
from preln.prune import score_halves
from preln.prune.half_scores import euclidean, jensen_shannon

from .oracles import batch, greedy_halves, stream, without_halves

pytestmark = pytest.mark.integration


def rows(frame, metric):
    return frame[frame["metric"] == metric]


def first(frame, metric, n):
    ranked = rows(frame, metric).sort_values("rank").head(n)
    return list(zip(ranked["layer"].tolist(), ranked["half"], strict=True))


def one_minus_cosine(x, y):
    return 1 - ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean()


def divergence(p, q):
    """Jensen-Shannon by probabilities, as it is written."""
    p, q = p.softmax(-1), q.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox", "olmo2"])
def test_llm_drop_equals_zeroed_weights(architecture):
    """h + branch(h) for attention is what a block returns whose MLP weights are zero."""
    model, ids = tiny_model(architecture, blocks=3), batch()
    states, count = stream(model, ids), 3
    parallel = architecture == "gpt_neox"
    expected = {"llm_drop_attention": [], "llm_drop_mlp": []}
    for k in range(count):
        x, y = states[k], states[k + 1]
        middle = stream(without_halves(model, [(k, "mlp")]), ids)[k + 1]
        other = stream(without_halves(model, [(k, "attention")]), ids)[k + 1]
        expected["llm_drop_attention"].append(one_minus_cosine(x, middle))
        expected["llm_drop_mlp"].append(
            one_minus_cosine(x, other) if parallel else one_minus_cosine(middle, y)
        )
    found = score_halves(model, ids, batch_size=2)
    for metric, values in expected.items():
        np.testing.assert_allclose(rows(found, metric)["score"], values, rtol=1e-4, atol=1e-6)
        assert rows(found, metric)["half"].unique().tolist() == [metric.removeprefix("llm_drop_")]
        assert rows(found, metric)["layer"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_iterative_llm_drop_equals_scoring_what_is_left(architecture, kind):
    model, ids = tiny_model(architecture, blocks=4), batch()
    gone = []
    for _ in range(2):
        small = without_halves(model, [(k, kind) for k in gone])
        table = score_halves(small, ids, f"llm_drop_{kind}")
        left = table[~table["layer"].isin(gone)].sort_values(["score", "layer"], ascending=[True, False])
        gone.append(int(left["layer"].iloc[0]))
    name = f"llm_drop_{kind}@1"
    found = score_halves(model, ids, name, size=2, batch_size=2)
    assert [k for k, _ in first(found, name, 2)] == gone


DISTANCES = {
    "finercut": divergence,
    "finercut_euclidean": lambda a, b: (a - b).norm(dim=-1),
    "finercut_angular": lambda a, b: torch.arccos(F.cosine_similarity(a, b, dim=-1)) / math.pi,
}


@pytest.mark.parametrize(
    ("architecture", "metric"),
    [("llama", m) for m in DISTANCES]
    + [("gpt2", "finercut"), ("gemma2", "finercut"), ("gpt_neox", "finercut")],
)
def test_finercut_equals_brute_force_with_zeroed_weights(architecture, metric):
    model, ids = tiny_model(architecture, blocks=3), batch(2, 6)
    gone, costs = greedy_halves(model, ids, 3, DISTANCES[metric])
    found = score_halves(model, ids, metric, size=3, batch_size=1)
    assert first(found, metric, 3) == gone
    table = rows(found, metric).set_index(["layer", "half"])
    rest = [h for h in costs if h not in gone]
    floor = table.loc[gone, "score"].max()
    expected = [max(costs[h], floor) for h in rest]
    np.testing.assert_allclose(table.loc[rest, "score"], expected, rtol=1e-3)


def test_finercut_protects_and_ranks_every_half_once():
    model, ids = tiny_model("gpt2", blocks=4), batch(2, 6)
    found = score_halves(model, ids, "finercut", size=2, protect="finercut")
    assert sorted(found["rank"]) == list(range(8))
    assert found["score"].notna().all()
    assert {k for k, _ in first(found, "finercut", 4)} == {2, 3}
    gone, _ = greedy_halves(model, ids, 2, divergence, spared=(0, 1))
    assert first(found, "finercut", 2) == gone


def test_half_scores_depend_neither_on_batch_size_nor_on_padding():
    model, ids = tiny_model("gemma2", blocks=3), batch(3, 7)
    names = ["llm_drop_attention", "llm_drop_mlp", "llm_drop_mlp@1", "finercut", "finercut_euclidean"]
    expected = score_halves(model, ids, names, size=2)
    padded = torch.cat([torch.full((3, 4), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 7)], dim=1).long()
    for other in (
        score_halves(model, ids, names, size=2, batch_size=1),
        score_halves(model, padded, names, attention_mask=mask, size=2, batch_size=2),
    ):
        np.testing.assert_allclose(other["score"], expected["score"], rtol=1e-3, atol=1e-6)
        assert other["rank"].tolist() == expected["rank"].tolist()


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_divergence_has_its_argument_order_right(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    found = jensen_shannon(a, b)
    assert (found <= math.log(2) + 1e-6).all() and (found >= -1e-6).all()
    torch.testing.assert_close(found, jensen_shannon(b, a), rtol=1e-5, atol=1e-7)
    assert jensen_shannon(a, a).abs().max() < 1e-6
    if scale == 1.0:
        torch.testing.assert_close(found, divergence(a, b).float(), rtol=1e-4, atol=1e-6)
        # negative control: the published order of arguments
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        m = torch.logaddexp(p, q) - math.log(2)
        reversed_ = sum((m.exp() * (m - x)).sum(-1) for x in (p, q)) / 2
        assert ((reversed_ - found).abs() > 1e-3 * found).any()
    torch.testing.assert_close(euclidean(a, b), (a - b).norm(dim=-1).float(), rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("llama", blocks=2), batch(2, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    score_halves(model.train(), ids, ["llm_drop_attention@1", "finercut"], size=1)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for b in find_blocks(model)[1] for m in b.modules()
    )


def test_what_cannot_be_done_is_one_line():
    model, ids = tiny_model("llama", blocks=2), batch(2, 5)
    for metrics, message in {
        "block_influence": "ranks no halves",
        "finercut@2": "one half at a time",
    }.items():
        with pytest.raises(InputError, match=message):
            score_halves(model, ids, metrics)
    with pytest.raises(InputError, match="size"):
        score_halves(model, ids, "finercut", size=4)
    with pytest.raises(InputError, match="leaves"):
        score_halves(model, ids, "finercut", size=2, protect="shortened-plus")
