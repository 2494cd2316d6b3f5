from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate import perplexity
from preln.evaluate.windows import loss_by_position, strided_perplexity
from preln.models import tiny_model, tiny_tokenizer, token_losses

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def _text(n, seed=0):
    return torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(seed))


def _one(model, context, token):
    """Loss of one token after a context, from the definition, in float64."""
    with torch.no_grad():
        logits = model(input_ids=context[None]).logits[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[token])


def test_stride_one_is_a_loop_that_runs_the_context_anew_for_every_token(model):
    ids, length = _text(40), 12
    losses = [_one(model, ids[max(0, i - length + 1) : i], int(ids[i])) for i in range(1, 40)]
    result = strided_perplexity(model, ids, length=length, stride=1)
    assert result.tokens == 39
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    # negative control: disjoint windows predict with less before them, and other tokens
    disjoint = strided_perplexity(model, ids, length=length, stride=length)
    assert abs(disjoint.loss - result.loss) > 1e-3


@pytest.mark.parametrize(("tokens", "length", "stride"), [(40, 16, 5), (37, 8, 7), (16, 16, 4), (9, 16, 3)])
def test_every_token_is_predicted_once_by_the_window_that_gets_there_first(model, tokens, length, stride):
    ids = _text(tokens)
    expected, done = [], 1
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        for i in range(done, end):
            expected.append(_one(model, ids[start:i], int(ids[i])))
            assert i - start >= min(i, length - stride)
        done = end
        if end == tokens:
            break
    result = strided_perplexity(model, ids, length=length, stride=stride, batch_size=3)
    assert result.tokens == len(expected) == tokens - 1
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert (result.sequences["context"][1:] == length - stride).all()


def test_windows_side_by_side_are_plain_perplexity(model):
    ids = _text(60)
    plain = perplexity(model, ids.reshape(5, 12))
    strided = strided_perplexity(model, ids, length=12, stride=12)
    assert strided.loss == pytest.approx(plain.loss, rel=1e-6)
    assert strided.tokens == plain.tokens == 55
    assert (strided.low, strided.high) == pytest.approx((plain.low, plain.high), rel=1e-6)


def test_a_left_over_token_without_context_is_not_predicted(model):
    result = strided_perplexity(model, _text(25), length=12, stride=12)
    assert result.tokens == 22
    assert strided_perplexity(model, _text(25), length=12, stride=11).tokens == 24


def test_a_string_is_read_by_the_tokenizer(model):
    text = "The cat sat on the mat and looked at the rain."
    ids = torch.tensor(tiny_tokenizer().encode(text, add_special_tokens=False))
    by_text = strided_perplexity(model, text, length=16, stride=8, tokenizer=tiny_tokenizer())
    assert by_text.loss == strided_perplexity(model, ids, length=16, stride=8).loss
    with pytest.raises(InputError, match="tokenizer"):
        strided_perplexity(model, text, length=16, stride=8)


def test_bad_windows_are_refused(model):
    for length, stride in [(1, 1), (8, 0), (8, 9)]:
        with pytest.raises(InputError, match="stride"):
            strided_perplexity(model, _text(20), length=length, stride=stride)
    with pytest.raises(InputError, match="at least two tokens"):
        strided_perplexity(model, _text(1), length=8, stride=4)
    with pytest.raises(InputError, match="one row"):
        strided_perplexity(model, _text(20)[None], length=8, stride=4)
    with pytest.raises(InputError, match="the model has 512"):
        strided_perplexity(model, _text(20) + 512, length=8, stride=4)


def test_the_interval_is_over_windows(model):
    result = strided_perplexity(model, _text(80), length=16, stride=8, seed=3)
    assert result.low < result.loss < result.high
    assert result.as_dict()["n"] == len(result.sequences) == 9
    assert math.isnan(strided_perplexity(model, _text(10), length=16, stride=8).low)


def _ragged():
    tokens = torch.randint(0, 512, (4, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * n + [0] * (20 - n) for n in (20, 13, 2, 20)])
    return tokens, mask


def test_positions_are_those_of_a_loop(model):
    tokens, mask = _ragged()
    losses, counted = token_losses(model, tokens, mask)
    table = loss_by_position(model, tokens, mask).set_index("first")
    assert list(table.index) == list(range(1, 20))
    for position in range(1, 20):
        own = [float(losses[i, position - 1]) for i in range(4) if counted[i, position - 1]]
        assert table["n"][position] == table["sequences"][position] == len(own)
        assert table["loss"][position] == pytest.approx(np.mean(own), rel=1e-5)
        assert table["low"][position] - 1e-6 <= table["loss"][position] <= table["high"][position] + 1e-6
    assert (table["loss"] * table["n"]).sum() / table["n"].sum() == pytest.approx(
        perplexity(model, tokens, mask).loss, rel=1e-6
    )


def test_buckets_pool_from_one_power_of_two_to_the_next(model):
    tokens, mask = _ragged()
    fine = loss_by_position(model, tokens, mask)
    table = loss_by_position(model, tokens, mask, buckets=True)
    assert table[["first", "last"]].to_numpy().tolist() == [[1, 1], [2, 3], [4, 7], [8, 15], [16, 19]]
    for _, row in table.iterrows():
        part = fine[(fine["first"] >= row["first"]) & (fine["first"] <= row["last"])]
        assert row["n"] == part["n"].sum()
        assert row["loss"] == pytest.approx((part["loss"] * part["n"]).sum() / part["n"].sum(), rel=1e-6)
    # negative control: shuffled positions give other numbers
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    other = loss_by_position(model, tokens[:, order], mask, buckets=True)
    assert (other["loss"] - table["loss"]).abs().max() > 1e-3


def test_left_padding_shifts_no_position(model):
    tokens, mask = _ragged()
    right = loss_by_position(model, tokens, mask)
    shifted = torch.stack([row.roll(20 - int(m.sum())) for row, m in zip(tokens, mask, strict=True)])
    left = loss_by_position(model, shifted, mask.flip(1))
    assert left["n"].tolist() == right["n"].tolist()
    # rotary positions are relative, so a Llama shifted as a whole gives the same losses
    assert np.allclose(left["loss"], right["loss"], rtol=1e-4)


def test_position_intervals_agree_with_a_slow_bootstrap(model):
    tokens = torch.randint(0, 512, (12, 10), generator=torch.Generator().manual_seed(4))
    table = loss_by_position(model, tokens, buckets=True, draws=4000)
    losses = token_losses(model, tokens)[0].double().numpy()[:, 3:7]
    generator = np.random.default_rng(1)
    means = [losses[generator.integers(0, 12, 12)].mean() for _ in range(4000)]
    row = table[table["first"] == 4].iloc[0]
    assert [row["low"], row["high"]] == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.2 * np.std(means)
    )


def test_one_sequence_has_no_interval(model):
    table = loss_by_position(model, _text(12)[None])
    assert table["low"].isna().all()
    with pytest.raises(InputError, match="no token to predict"):
        loss_by_position(model, _text(12)[None], torch.zeros(1, 12, dtype=torch.long))
