from __future__ import annotations

import gzip
import json

import pytest
import torch

from preln.base.errors import InputError
from preln.data import document_split, documents, fingerprint, load_tokens
from preln.models import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"document {n} " + "word " * (5 + n % 7)} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_batch_has_the_shape_asked_for_and_is_the_same_every_time(corpus, tokenizer):
    first = load_tokens(corpus, tokenizer, sequences=5, length=32, seed=3)
    again = load_tokens(corpus, tokenizer, sequences=5, length=32, seed=3)
    assert first.dtype == torch.long
    assert first.shape == (5, 32)
    assert torch.equal(first, again)


def test_another_seed_gives_another_batch(corpus, tokenizer):
    one = load_tokens(corpus, tokenizer, sequences=5, length=32, seed=0)
    two = load_tokens(corpus, tokenizer, sequences=5, length=32, seed=1)
    assert not torch.equal(one, two)


def test_the_order_of_rows_in_the_file_plays_no_part(corpus, tokenizer, tmp_path):
    shuffled = tmp_path / "shuffled.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    shuffled.write_text("".join(reversed(lines)), encoding="utf-8")
    assert torch.equal(load_tokens(corpus, tokenizer), load_tokens(shuffled, tokenizer))


def test_windows_are_the_stream_of_documents_joined_by_eos_cut_without_overlap(corpus, tokenizer):
    train = sorted(t for t in documents(corpus) if document_split(t) == "train")
    total = sum(len(text) + 1 for text in train) // 16  # one token a byte, and eos
    batch = load_tokens(corpus, tokenizer, sequences=total, length=16)
    stream = {
        tuple(ids) for text in train for ids in [tokenizer(text, add_special_tokens=False)["input_ids"]]
    }
    # all windows together hold each document's tokens at most once: eos appears once a document, and the
    # number of windows is what the stream has
    assert batch.shape == (total, 16)
    eos = int((batch == tokenizer.eos_token_id).sum())
    assert len(stream) - 1 <= eos <= len(stream)
    with pytest.raises(InputError, match=rf"holds {total} windows of 16 tokens, not {total + 1}"):
        load_tokens(corpus, tokenizer, sequences=total + 1, length=16)


def test_windows_are_drawn_without_replacement(tmp_path, tokenizer):
    path = tmp_path / "numbers.jsonl"  # counting never repeats itself, so equal windows are one window
    texts = [" ".join(str(n) for n in range(50 * k, 50 * k + 50)) for k in range(100, 200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    batch = load_tokens(path, tokenizer, sequences=700, length=24)
    assert len({tuple(row) for row in batch.tolist()}) == 700


def test_the_splits_share_no_document_whatever_the_seed(tmp_path, tokenizer):
    # each document is one repeated letter pair, so that a window tells which documents it holds
    path = tmp_path / "letters.jsonl"
    pairs = [chr(a) + chr(b) for a in range(97, 117) for b in range(97, 117)]
    path.write_text("".join(json.dumps({"text": p * 40}) + "\n" for p in pairs), encoding="utf-8")
    halves: dict[str, set[str]] = {"train": set(), "validation": set()}
    for seed in range(3):
        for split, seen in halves.items():
            batch = load_tokens(path, tokenizer, sequences=30, length=80, seed=seed, split=split)
            for row in batch:
                for part in tokenizer.decode(row).split("<|endoftext|>"):
                    if len(part) >= 2:
                        seen.add("".join(sorted(part[:2])) if len(part) < 3 else part[:2])
    # cut windows may begin on either letter of a pair, so both readings are looked up
    texts = {pair * 40: document_split(pair * 40) for pair in pairs}
    own = {pair for pair in pairs if texts[pair * 40] == "validation"}
    for piece in halves["validation"]:
        assert piece in own or piece[::-1] in own
    trained = {pair for pair in pairs if texts[pair * 40] == "train"}
    for piece in halves["train"]:
        assert piece in trained or piece[::-1] in trained


def test_about_one_document_in_ten_is_validation():
    share = sum(document_split(f"text {n}") == "validation" for n in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_bos_starts_documents_where_the_tokenizer_adds_it(corpus):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    backend = tokenizer.backend_tokenizer
    plain = load_tokens(corpus, tokenizer, sequences=20, length=32)
    assert not (plain == tokenizer.bos_token_id).any()
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    batch = load_tokens(corpus, tokenizer, sequences=20, length=32)
    begins = batch[:, 1:] == tokenizer.bos_token_id
    ends = batch[:, :-1] == tokenizer.eos_token_id
    assert begins.any()
    assert torch.equal(begins, ends)


def test_gzip_and_plain_files_give_the_same_tokens(corpus, tokenizer, tmp_path):
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    assert torch.equal(load_tokens(corpus, tokenizer), load_tokens(packed, tokenizer))


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"length": 0}, {"sequences": True}, {"split": "test"}])
def test_bad_counts_and_splits_are_refused(corpus, tokenizer, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        load_tokens(corpus, tokenizer, **wrong)


def test_a_tokenizer_without_a_separator_is_refused(corpus):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos"):
        load_tokens(corpus, tokenizer)


def test_fingerprint_is_the_documented_hash():
    import hashlib
    import struct

    tokens = torch.tensor([[1, 2, 3], [4, 5, 600]])
    expected = hashlib.sha256(b"2,3;" + struct.pack("<6q", 1, 2, 3, 4, 5, 600)).hexdigest()
    assert fingerprint(tokens) == expected
    assert fingerprint(tokens.T.contiguous().T) == expected  # memory layout plays no part
    assert fingerprint(tokens.reshape(3, 2)) != expected
    changed = tokens.clone()
    changed[1, 2] += 1
    assert fingerprint(changed) != expected
    with pytest.raises(InputError, match="integer"):
        fingerprint(tokens.float())
