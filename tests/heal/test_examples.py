from __future__ import annotations

import hashlib

import pytest
import torch
from torch.nn import functional as F

from preln.base.errors import InputError
from preln.data import fingerprint
from preln.heal import as_examples
from preln.heal.rows.examples import IGNORED, Examples, batch_rows
from preln.heal.rows.packing import forward_inputs
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
        [ALPACA, {**ALPACA, "input": "", "output": "three"}], tokenizer=tokenizer, length=400, packed=False
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


@pytest.mark.parametrize("packed", [False, True])
def test_long_texts_are_cut_and_nothing_is_lost(packed: bool) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"text": "abcdefghij"}, {"text": "xyz"}]
    examples = as_examples(rows, tokenizer=tokenizer, length=4, packed=packed)
    assert examples.documents is None  # no window has room for two pieces
    texts = [
        tokenizer.decode(i[m.bool()])
        for i, m in zip(examples.input_ids, examples.attention_mask, strict=True)
    ]
    assert texts == ["abcd", "efgh", "ij<|endoftext|>", "xyz<|endoftext|>"]


def test_fingerprints_of_old_forms_are_those_of_old() -> None:
    """The hashes that data had before windows could be shared: a stored run must recognise its data."""
    ids = torch.arange(6).reshape(2, 3)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 0], mask[1, 2] = IGNORED, 0
    assert Examples(ids, ids).fingerprint() == fingerprint(ids)
    parts = [fingerprint(ids), fingerprint(labels)]
    assert Examples(ids, labels).fingerprint() == _joined(parts)
    parts.append(fingerprint(mask))
    assert Examples(ids, labels, mask).fingerprint() == _joined(parts)
    shared = Examples(ids, labels, mask, torch.tensor([[0, 0, 1], [0, 1, -1]]))
    other = Examples(ids, labels, mask, torch.tensor([[0, 1, 1], [0, 1, -1]]))
    whole = Examples(ids, ids, None, torch.zeros_like(ids))
    found = {e.fingerprint() for e in (shared, other, whole, Examples(ids, labels, mask), Examples(ids, ids))}
    assert len(found) == 5


def _joined(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_what_is_done_to_windows_is_done_to_their_documents() -> None:
    rows = [{"text": "ab"}, {"text": "abcdef"}, {"text": "cd"}, {"text": "efghij"}]
    examples = as_examples(rows, tokenizer=tiny_tokenizer(), length=10)
    assert examples.documents is not None
    assert examples.documents.tolist() == [[0] * 3 + [1] * 7, [0] * 3 + [1] * 7]
    assert examples.attention_mask is None
    taken = examples.take([1])
    assert taken.documents is not None
    assert torch.equal(taken.documents, examples.documents[1:])
    moved = taken.to(torch.device("meta"))
    assert moved.documents is not None
    assert all(part.device.type == "meta" for part in (moved.input_ids, moved.labels, moved.documents))
    assert as_examples(examples) is examples


def test_token_ids_are_left_as_they_are() -> None:
    for packed in (False, True):
        examples = as_examples(random_tokens(3, 5), packed=packed)
        assert examples.documents is None
        assert torch.equal(examples.input_ids, random_tokens(3, 5))


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
        [ALPACA, {**ALPACA, "output": "a longer answer"}],
        tokenizer=tiny_tokenizer(),
        length=400,
        packed=False,
    ).take([0, 1])
    total = 0.0
    with torch.no_grad():
        for row in range(2):  # each by itself, without padding
            real = examples.attention_mask[row].bool()
            ids = examples.input_ids[row][real][None]
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            for t in range(1, ids.shape[1]):
                if examples.labels[row, t] != IGNORED:
                    total -= float(log_p[t - 1, ids[0, t]])
        logits = model(**forward_inputs(model, examples)).logits[:, :-1].double()
        together = F.cross_entropy(
            logits.flatten(0, 1), examples.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
    assert float(together) == pytest.approx(total, rel=1e-6)


def test_packing_is_the_default_of_rows_and_saves_windows() -> None:
    rows = [{"instruction": f"Say {n}.", "output": "yes " * (20 * (n % 4 == 0))} for n in range(12)]
    options = {"tokenizer": tiny_tokenizer(), "length": 400, "template": "alpaca"}
    packed, apart = as_examples(rows, **options), as_examples(rows, **options, packed=False)
    assert packed.documents is not None
    assert apart.documents is None
    assert (packed.tokens, packed.supervised) == (apart.tokens, apart.supervised)
    assert packed.input_ids.numel() < apart.input_ids.numel()
    assert len(packed) < len(apart) == 12
    everything = as_examples(rows, **options, supervise="all")
    assert everything.tokens == packed.tokens
    assert everything.supervised == packed.tokens - 12  # the first token of a row is never predicted
    with pytest.raises(InputError, match="supervise='none'"):
        as_examples(rows, **options, supervise="none")
    with pytest.raises(InputError, match="row 0: the tokenizer has no chat template"):
        as_examples(rows, **{**options, "template": "chat"})
