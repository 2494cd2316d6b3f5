from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, Stored, drop_blocks, find_blocks, tiny_model, token_losses
from preln.models.residual import change, global_gap
from preln.prune import CRITERIA, depth_sweep, leave_one_out, random_orders, score

from .oracles import batch, loss, stream
from .oracles import column as scores_of

pytestmark = pytest.mark.integration


def states_and_gradients(model, ids):
    """x[0..L] with gradients of the mean loss, by transformers' own outputs and a hook on the final norm."""
    kept = []
    final = getattr(model, "transformer", None) or model.model
    handle = getattr(final, "ln_f" if hasattr(final, "ln_f") else "norm").register_forward_pre_hook(
        lambda m, a: kept.append(a[0])
    )
    out = model(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
    handle.remove()
    states = [*out.hidden_states[:-1], kept[0]]
    for state in states:
        state.retain_grad()
    model.zero_grad()
    out.loss.backward()
    return [(s.detach().double().numpy(), s.grad.double().numpy()) for s in states]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_one_shot_criteria_equal_their_formulas(architecture):
    model, ids = tiny_model(architecture, blocks=3), batch()
    found = score(model, ids, "all", batch_size=2)
    flow, blocks = states_and_gradients(model, ids), find_blocks(model)[1]
    taylor = [sum((p.grad * p).abs().sum().item() for p in b.parameters()) for b in blocks]
    np.testing.assert_allclose(scores_of(found, "taylor"), taylor, rtol=1e-3)
    influence, whole, damage = [], [], []
    for (x, _), (y, g) in itertools.pairwise(flow):
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        influence.append(1 - cosines.mean())
        whole.append(1 - (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        damage.append(-(g * (y - x)).sum())
    np.testing.assert_allclose(scores_of(found, "block_influence"), influence, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores_of(found, "block_influence_global"), whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores_of(found, "first_order_damage"), damage, rtol=1e-3, atol=1e-5)
    final = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    x, y = flow[-2][0], final.detach().double().numpy()
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    shortgpt = [v * ids.numel() for v in [*influence[:-1], 1 - cosines.mean()]]
    np.testing.assert_allclose(scores_of(found, "block_influence_shortgpt"), shortgpt, rtol=1e-4, atol=1e-5)
    l1, l2, squared = [], [], []
    for block in blocks:
        named = {n: p.detach().double() for n, p in block.named_parameters()}
        squared.append(sum((p**2).sum().item() for n, p in named.items() if n.endswith("weight")))
        l1.append(sum(p.abs().sum().item() for n, p in named.items() if not n.endswith("bias")))
        l2.append(sum(math.sqrt((p**2).sum().item()) for p in named.values() if p.ndim == 2))
    np.testing.assert_allclose(scores_of(found, "magnitude_l1"), l1, rtol=1e-6)
    np.testing.assert_allclose(scores_of(found, "magnitude_l2"), l2, rtol=1e-6)
    np.testing.assert_allclose(scores_of(found, "magnitude_l2_squared"), squared, rtol=1e-6)
    assert scores_of(found, "reverse").tolist() == [3, 2, 1]
    model.zero_grad()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_taylor_by_sequence_equals_backward_passes_one_by_one(architecture):
    model, ids = tiny_model(architecture, blocks=3), batch()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0  # sequences count by their targets
    found = score(model, ids, ["taylor", "taylor_by_sequence"], attention_mask=mask)
    blocks, expected = find_blocks(model)[1], np.zeros(3)
    for row, real in zip(ids, mask.bool(), strict=True):
        model.zero_grad()
        model(input_ids=row[real][None], labels=row[real][None], use_cache=False).loss.backward()
        share = (int(real.sum()) - 1) / 18
        expected += [share * sum((p.grad * p).abs().sum().item() for p in b.parameters()) for b in blocks]
    model.zero_grad()
    np.testing.assert_allclose(scores_of(found, "taylor_by_sequence"), expected, rtol=1e-3)
    # the triangle inequality; strict here, so that the two are not the same thing
    assert (scores_of(found, "taylor_by_sequence") > 1.01 * scores_of(found, "taylor")).all()
    one = score(model, ids[:1], ["taylor", "taylor_by_sequence"])
    np.testing.assert_allclose(scores_of(one, "taylor"), scores_of(one, "taylor_by_sequence"), rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_leaving_out_equals_really_dropping(architecture):
    model, ids = tiny_model(architecture, blocks=3), batch(3, 9)
    table = leave_one_out(model, ids, batch_size=2)
    whole, mask = token_losses(model, ids)
    dense = table[table["layer"] == -1].sort_values("sequence")["loss"]
    np.testing.assert_allclose(dense, whole.mean(dim=1), rtol=1e-5)
    perplexity = scores_of(score(model, ids, ["perplexity"]), "perplexity")
    for k in range(3):
        losses, mask = token_losses(drop_blocks(model, [k]), ids)
        mine = table[table["layer"] == k].sort_values("sequence")["loss"]
        np.testing.assert_allclose(mine, losses.mean(dim=1), rtol=1e-5)
        assert perplexity[k] == pytest.approx(math.exp(losses[mask].mean().item()), rel=1e-4)
    # negative control: leaving out a block is not leaving out its neighbour
    wrong = token_losses(drop_blocks(model, [1]), ids)[0].mean(dim=1)
    mine = table[table["layer"] == 2].sort_values("sequence")["loss"]
    assert not np.allclose(mine, wrong, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom", "opt-post"])
def test_the_sweep_equals_really_dropping_from_the_end(architecture):
    model, ids = tiny_model(architecture, blocks=4), batch(3, 9)
    table = depth_sweep(model, ids, batch_size=2)
    assert sorted(table["layer"].unique()) == [0, 1, 2, 3, 4]
    mean = table.groupby("layer")["loss"].mean()
    assert mean[4] == pytest.approx(loss(model, ids), rel=1e-5)
    for k in (1, 2, 3):
        assert mean[k] == pytest.approx(loss(drop_blocks(model, range(k, 4)), ids), rel=1e-5)
    # the last depth is one of the blocks left out
    one = leave_one_out(model, ids)
    assert mean[3] == pytest.approx(one[one["layer"] == 3]["loss"].mean(), rel=1e-5)
    assert mean[1] != pytest.approx(mean[2], rel=1e-4)


def test_the_sweep_does_not_depend_on_batch_size_or_padding():
    model, ids = tiny_model("gemma2"), batch(3, 8)
    expected = depth_sweep(model, ids)
    padded = torch.cat([torch.full((3, 5), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 5), torch.ones(3, 8)], dim=1).long()
    for other in (
        depth_sweep(model, ids, batch_size=1),
        depth_sweep(model, padded, attention_mask=mask, batch_size=2),
    ):
        np.testing.assert_allclose(other["loss"], expected["loss"], rtol=1e-4)
        assert other["tokens"].tolist() == expected["tokens"].tolist()


def every_metric():
    return [*CRITERIA, "block_influence@1", "taylor@1", "angular@2", "perplexity@2"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_depend_neither_on_batch_size_nor_on_padding(side):
    model, ids = tiny_model("llama"), batch(4, 8)
    names = every_metric()
    expected = score(model, ids, names, batch_size=4, size=2)
    one = score(model, ids, names, batch_size=1, size=2)
    fill, gap = torch.full((4, 5), 7), torch.zeros(4, 5)
    parts, masks = [ids, fill], [torch.ones(4, 8), gap]
    turn = -1 if side == "left" else 1
    padded, mask = torch.cat(parts[::turn], dim=1), torch.cat(masks[::turn], dim=1).long()
    masked = score(model, padded, names, attention_mask=mask, batch_size=3, size=2)
    for other in (one, masked):
        for name in names:
            found, wanted = scores_of(other, name), scores_of(expected, name)
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6, err_msg=name)
    unmasked = score(model, padded, ["perplexity"])
    assert not np.allclose(scores_of(unmasked, "perplexity"), scores_of(expected, "perplexity"), rtol=1e-3)


@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 6), power=st.integers(-8, 8))
def test_rescaling_tokens_leaves_influence_alone_but_not_the_global_one(seed, tokens, power):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 8, generator=generator, dtype=torch.float64)
    y = x + torch.randn(1, tokens, 8, generator=generator, dtype=torch.float64)
    scale = torch.ones(1, tokens, 1, dtype=torch.float64)
    scale[0, 0] = 10.0**power
    before, after = change(x, y), change(scale * x, scale * y)
    torch.testing.assert_close(before.gap, after.gap)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    whole = [float(global_gap(*(v.sum() for v in c.squares(mask)))) for c in (before, after)]
    if power == 8:  # one token drowns the rest: the global value is that token's own
        assert whole[1] == pytest.approx(before.gap[0, 0].item(), abs=1e-6)
    if power == 0:
        assert whole[0] == pytest.approx(whole[1])


def test_the_global_influence_does_change_with_scale():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    y = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    grown = torch.tensor([[[1.0], [9.0]]])
    values = [
        float(global_gap(*(v.sum() for v in change(s * x, s * y).squares(mask))))
        for s in (torch.ones(1, 2, 1), grown)
    ]
    assert values[0] == pytest.approx(0.5) and values[1] == pytest.approx(81 / 82)


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_the_gap_of_near_states_keeps_its_digits(distance):
    """1 - cos in float32 would be rounding noise here."""
    x = torch.tensor([[[1.0, 0.0, 0.0]]])
    y = x + torch.tensor([[[0.0, distance, 0.0]]])
    assert change(x, y).gap.item() == pytest.approx(distance**2 / 2, rel=1e-3)


def test_random_is_a_seeded_order_and_ranks_are_orders():
    model, ids = tiny_model("gpt2"), batch()
    first, again = score(model, ids, "random", seed=5), score(model, ids, "random", seed=5)
    pd.testing.assert_frame_equal(first, again)
    draws = {tuple(score(model, ids, "random", seed=s)["rank"]) for s in range(20)}
    assert len(draws) > 5
    for _, group in score(model, ids, "all").groupby("metric"):
        assert sorted(group["rank"]) == list(range(4))
        assert group.sort_values("rank")["score"].is_monotonic_increasing
    reverse = score(model, ids, "reverse")
    assert reverse.sort_values("rank")["layer"].tolist() == [3, 2, 1, 0]


def test_draws_are_the_seeds_own_orders():
    model, ids = tiny_model("gpt2"), batch()
    table = random_orders(4, draws=3, seed=7)
    for draw, group in table.groupby("draw"):
        expected = score(model, ids, "random", seed=7 + draw)
        assert group["rank"].tolist() == expected["rank"].tolist()
        assert group["score"].tolist() == expected["score"].tolist()


def test_all_is_what_shares_its_passes_and_has_one_row_a_block():
    model, ids = tiny_model("gpt2"), batch()
    found = score(model, ids, "all")
    assert set(found["metric"]) == {name for name, c in CRITERIA.items() if c.shared}
    assert {"sleb", "attenuated_contribution", "taylor_by_sequence"}.isdisjoint(found["metric"])
    named = score(model, ids, every_metric(), size=2)
    for _, group in [*found.groupby("metric"), *named.groupby("metric")]:
        assert group["layer"].tolist() == [0, 1, 2, 3]
        assert sorted(group["rank"]) == [0, 1, 2, 3]
        assert group.sort_values("rank")["score"].is_monotonic_increasing


def test_zero_states_count_as_half_similar_for_shortgpt():
    model, ids = tiny_model("llama", blocks=2), batch(1, 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 1]] = 0.0
    table = score(model, ids, ["block_influence", "block_influence_shortgpt"])
    plain, shortgpt = (scores_of(table, m)[0] for m in ("block_influence", "block_influence_shortgpt"))
    assert shortgpt == pytest.approx(4 * plain - 0.5, rel=1e-5)


def test_the_last_block_is_all_that_shortgpt_sees_otherwise():
    model, ids = tiny_model("llama"), batch()
    table = score(model, ids, ["block_influence", "block_influence_shortgpt"])
    plain, shortgpt = (scores_of(table, m) for m in ("block_influence", "block_influence_shortgpt"))
    np.testing.assert_allclose(shortgpt[:-1], ids.numel() * plain[:-1], rtol=1e-6)
    assert abs(shortgpt[-1] / ids.numel() - plain[-1]) > 1e-3


def test_quantised_weights_are_refused_where_they_would_be_read():
    model, ids = tiny_model("llama", blocks=2), batch(2, 5)
    layer = find_blocks(model)[1][1].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    for metric in ("magnitude_l1", "magnitude_l2", "magnitude_l2_squared"):
        with pytest.raises(InputError, match=r"block 1: .* stored as torch.uint8"):
            score(model, ids, metric)


def test_the_states_in_the_stream_are_those_of_plain_hooks():
    model, ids = tiny_model("bloom", blocks=3), batch()
    flow = stream(model, ids)
    gaps = [
        1 - ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean()
        for x, y in itertools.pairwise(flow)
    ]
    found = score(model, ids, "block_influence")
    np.testing.assert_allclose(scores_of(found, "block_influence"), gaps, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("llama"), batch()
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    score(model, ids, every_metric(), size=2)
    depth_sweep(model, ids)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(m, Stored) for m in model.modules())


def test_bad_input_is_one_line():
    model, ids = tiny_model("llama"), batch()
    with pytest.raises(InputError, match="unknown"):
        score(model, ids, ["nonsense"])
    with pytest.raises(InputError, match="no metric"):
        score(model, ids, [])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="block 1"):
        score(model, ids, ["block_influence"])
    with pytest.raises(InputError, match="not finite"):
        leave_one_out(model, ids)


def test_every_criterion_says_what_it_is():
    assert all(len(c.summary) > 20 for c in CRITERIA.values())
