from __future__ import annotations

import pytest
import torch

from preln.base.errors import InputError
from preln.data import fingerprint
from preln.heal import as_examples
from preln.heal.examples import IGNORED, batch_rows
from preln.heal.loop import mean_loss, summed_loss
from preln.models import tiny_model, tiny_tokenizer

from .helpers import random_tokens

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def test_tokens_are_supervised_everywhere() -> None:
    ids = random_tokens(3, 5)
    examples = as_examples(ids)
    assert torch.equal(examples.labels, ids)
    assert examples.attention_mask is None
    assert (len(examples), examples.tokens, examples.supervised) == (3, 15, 12)
    assert examples.fingerprint() == fingerprint(ids)


def test_alpaca_rows_are_supervised_on_the_response() -> None:
    tokenizer = tiny_tokenizer()
    examples = as_examples(
        [ALPACA, {**ALPACA, "input": "", "output": "three"}], tokenizer=tokenizer, length=400
    )
    for row, answer in enumerate(["3", "three"]):
        wanted = examples.labels[row] != IGNORED
        assert tokenizer.decode(examples.input_ids[row][wanted]) == answer + "<|endoftext|>"
        assert torch.equal(examples.labels[row][wanted], examples.input_ids[row][wanted])
    first, second = (tokenizer.decode(examples.input_ids[i]) for i in range(2))
    assert "### Input:\n1 2\n\n### Response:\n3" in first
    assert "### Input" not in second
    assert examples.supervised == 2 + 6
    sizes = [len(text.replace("<|endoftext|>", "")) + 1 for text in (first, second)]
    assert examples.attention_mask.sum(1).tolist() == sizes
    plain = as_examples(examples.input_ids)
    assert plain.fingerprint() != examples.fingerprint()


def test_long_texts_are_cut_and_nothing_is_lost() -> None:
    tokenizer = tiny_tokenizer()
    examples = as_examples([{"text": "abcdefghij"}, {"text": "xyz"}], tokenizer=tokenizer, length=4)
    texts = [
        tokenizer.decode(i[m.bool()])
        for i, m in zip(examples.input_ids, examples.attention_mask, strict=True)
    ]
    assert texts == ["abcd", "efgh", "ij<|endoftext|>", "xyz<|endoftext|>"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no rows"),
        (["text"], "row 0: is str"),
        ([{"txt": "a"}], "row 0: has no text under 'instruction'"),
        ([ALPACA, {"instruction": "a"}], "row 1: has no text under 'output'"),
        (torch.zeros(4, dtype=torch.long), "shape"),
        (torch.zeros(2, 4), "integers"),
        (torch.full((2, 4), 512), "token id 512 is outside"),
        (torch.full((2, 4), -1), "token id -1 is outside"),
        (torch.zeros((0, 4), dtype=torch.long), "shape"),
    ],
)
def test_bad_data_is_named(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_examples(source, tokenizer=tiny_tokenizer(), vocabulary=512)


def test_rows_need_a_tokenizer_and_room_for_the_response() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        as_examples([ALPACA])
    with pytest.raises(InputError, match="length=16"):
        as_examples([ALPACA], tokenizer=tiny_tokenizer(), length=16)


def test_batches_walk_through_every_epoch_once() -> None:
    seen = [row for step in range(10) for row in batch_rows(5, 3, seed=7, step=step)]
    epochs = [seen[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_rows(5, 3, seed=7, step=4) == batch_rows(5, 3, seed=7, step=4)
    assert batch_rows(50, 3, seed=0, step=0) != batch_rows(50, 3, seed=1, step=0)


@pytest.mark.integration
def test_losses_count_supervised_tokens_only() -> None:
    model = tiny_model("llama")
    examples = as_examples(
        [ALPACA, {**ALPACA, "output": "a longer answer"}], tokenizer=tiny_tokenizer(), length=400
    )
    total = 0.0
    with torch.no_grad():
        for row in range(2):  # each by itself, without padding
            real = examples.attention_mask[row].bool()
            ids = examples.input_ids[row][real][None]
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            for t in range(1, ids.shape[1]):
                if examples.labels[row, t] != IGNORED:
                    total -= float(log_p[t - 1, ids[0, t]])
        together = float(summed_loss(model, examples))
    assert together == pytest.approx(total, rel=1e-5)
    assert mean_loss(model, examples) == pytest.approx(total / examples.supervised, rel=1e-5)
