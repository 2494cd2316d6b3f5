from __future__ import annotations

import math

import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate import perplexity
from preln.models import tiny_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def _ragged(lengths, width, seed=0):
    """Right-padded ids with their mask; padding holds random ids, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (len(lengths), width), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return tokens, mask


def _by_hand(model, ids):
    """Sum of next-token losses of one unpadded sequence, from the definition, in float64."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    total = 0.0
    for i in range(len(ids) - 1):
        shifted = logits[i] - logits[i].max()
        total -= float(shifted[ids[i + 1]] - torch.log(torch.exp(shifted).sum()))
    return total


def test_loss_is_the_mean_over_real_tokens_of_each_sequence_run_alone(model):
    lengths = [24, 7, 2, 15]
    tokens, mask = _ragged(lengths, 24)
    sums = [_by_hand(model, row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    result = perplexity(model, tokens, mask, batch_size=3)
    predicted = sum(n - 1 for n in lengths)
    assert result.tokens == predicted
    assert result.loss == pytest.approx(sum(sums) / predicted, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(sums) / predicted), rel=1e-5)
    assert result.sequences["tokens"].tolist() == [n - 1 for n in lengths]
    for row, total, n in zip(result.sequences["loss"], sums, lengths, strict=True):
        assert row == pytest.approx(total / (n - 1), rel=1e-5)
    # negative controls: the mean of sequence means, and the mean with padding, are other numbers
    assert abs(result.sequences["loss"].mean() - result.loss) > 1e-4
    assert abs(perplexity(model, tokens).loss - result.loss) > 1e-4


def test_what_padding_holds_and_how_it_is_batched_plays_no_part(model):
    tokens, mask = _ragged([10, 20, 5], 20)
    other = torch.where(mask.bool(), tokens, torch.full_like(tokens, 7))
    first = perplexity(model, tokens, mask, batch_size=1)
    second = perplexity(model, other, mask, batch_size=3)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)


def test_interval_holds_the_loss_and_is_fixed_by_the_seed(model):
    tokens, mask = _ragged([30] * 10, 30)
    result = perplexity(model, tokens, mask, seed=1)
    assert result.low < result.loss < result.high
    again = perplexity(model, tokens, mask, seed=1)
    assert (again.low, again.high) == (result.low, result.high)


def test_an_empty_sequence_is_left_out_of_the_interval_but_listed(model):
    tokens, mask = _ragged([12, 1, 9], 12)
    result = perplexity(model, tokens, mask)
    assert result.tokens == 11 + 8
    assert math.isnan(result.sequences["loss"][1])
    assert math.isfinite(result.low)


def test_one_sequence_has_no_interval_and_says_so_in_json_types(model):
    tokens, _ = _ragged([12], 12)
    told = perplexity(model, tokens).as_dict()
    assert told["low"] is None
    assert told["high"] is None
    assert told["n"] == 1


def test_a_hopeless_model_has_infinite_perplexity(model):
    import copy

    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.lm_head.weight.mul_(1e4)
    tokens, _ = _ragged([12, 12], 12)
    result = perplexity(loud, tokens)
    assert result.loss > 710
    assert math.isinf(result.perplexity)
    assert result.as_dict()["perplexity"] is None


def test_bad_input_is_refused(model):
    tokens, mask = _ragged([8, 8], 8)
    for bad, message in [
        (tokens[0], "must be"),
        (tokens[:, :1], "at least 2"),
        (tokens.float(), "integer ids"),
        (tokens + 512, "the model has 512"),
        (-tokens - 1, "the model has 512"),
    ]:
        with pytest.raises(InputError, match=message):
            perplexity(model, bad)
    with pytest.raises(InputError, match="equal shapes"):
        perplexity(model, tokens, mask[:, :4])
    with pytest.raises(InputError, match="no token to predict"):
        perplexity(model, tokens, torch.zeros_like(mask))


def test_weights_that_are_not_finite_are_refused(model):
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    tokens, _ = _ragged([8, 8], 8)
    with pytest.raises(InputError, match="sequence 0 is not finite"):
        perplexity(broken, tokens)
