from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

import preln
from preln.base.errors import InputError
from preln.data import fingerprint
from preln.evaluate import evaluate, read_results, strided_perplexity, write_results
from preln.models import drop_blocks

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def result(tiny, rows_folder):
    model, tokenizer = tiny
    tokens = torch.arange(48).reshape(3, 16)
    return evaluate(
        model, tokenizer, ["piqa", "arc_easy"], tokens=tokens, limit=3, source=rows_folder, name="dense"
    )


def test_the_room_can_be_called_by_its_own_name(tiny):
    called = preln.evaluate(tiny[0], tokens=torch.arange(32).reshape(2, 16))
    assert called["perplexity"]["tokens"] == 30


def test_stored_results_hold_the_numbers_and_lm_evals_own_beside_them(result, tmp_path):
    path = write_results(result, tmp_path / "out")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["model"] == "dense"
    assert stored["tasks"] == result["tasks"]
    assert set(stored["tasks"]["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    assert stored["mean_acc"] == pytest.approx(sum(t["acc"] for t in stored["tasks"].values()) / 2)
    assert stored["source"]["piqa"]["kind"] == "folder"
    assert stored["perplexity"]["fingerprint"] == fingerprint(torch.arange(48).reshape(3, 16))
    assert stored["perplexity"]["tokens"] == 45
    own = json.loads((tmp_path / "out" / "lm_eval.json").read_text(encoding="utf-8"))
    assert own["results"]["piqa"]["acc,none"] == stored["tasks"]["piqa"]["acc"]
    assert own["n-shot"]["piqa"] == 0
    documents = pd.read_parquet(tmp_path / "out" / "documents.parquet")
    assert documents.equals(result["documents"])
    assert len(pd.read_parquet(tmp_path / "out" / "sequences.parquet")) == 3
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_perplexity_alone_needs_no_tokenizer(tiny, tmp_path):
    model, _ = tiny
    alone = evaluate(model, tokens=torch.arange(32).reshape(2, 16))
    assert alone["mean_acc"] is None
    write_results(alone, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "sequences.parquet"]


def test_every_part_is_carried_and_stored(tiny, rows_folder, tmp_path):
    model, tokenizer = tiny
    small = drop_blocks(model, [1])
    tokens = torch.arange(48).reshape(3, 16)
    told = {"tasks": ["piqa"], "limit": 3, "source": rows_folder}
    dense = evaluate(model, tokenizer, **told)
    found = evaluate(
        small,
        tokenizer,
        **told,
        tokens=tokens,
        stride=8,
        positions=True,
        prompts=["Rain", "The cat"],
        new_tokens=4,
        embed=lambda texts: torch.tensor([[len(text), 1.0] for text in texts]),
        timed=True,
        reference=model,
        against=dense,
    )
    assert found["strided"]["loss"] == strided_perplexity(small, tokens.flatten(), length=16, stride=8).loss
    assert found["comparison"]["task"].tolist() == ["piqa", "mean of tasks"]
    assert found["comparison"]["second"][0] == found["tasks"]["piqa"]["acc"]
    assert {row["measure"] for row in found["generation"]} > {"corpus_bleu", "similarity", "repeated_4"}
    assert set(found["speed"]["model"]) == {"dense", "pruned"}
    write_results(found, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["strided"] == found["strided"]
    assert stored["generation"] == found["generation"]
    frames = ["comparison", "continuations", "documents", "positions", "sequences", "speed", "speedup"]
    assert sorted(p.stem for p in tmp_path.glob("*.parquet")) == [*frames, "windows"]
    for frame in frames:
        assert pd.read_parquet(tmp_path / f"{frame}.parquet").equals(found[frame])


def test_a_stored_result_can_be_compared_with(result, tiny, rows_folder, tmp_path):
    write_results(result, tmp_path / "dense")
    told = {"tasks": ["piqa", "arc_easy"], "limit": 3, "source": rows_folder}
    found = evaluate(*tiny, **told, against=read_results(tmp_path / "dense"))
    assert (found["comparison"]["difference"] == 0).all()
    assert found["comparison"]["n"].tolist() == [3, 3, 6]
    write_results(evaluate(tiny[0], tokens=torch.arange(32).reshape(2, 16)), tmp_path / "tokens")
    with pytest.raises(InputError, match="no documents"):
        read_results(tmp_path / "tokens")
    with pytest.raises(InputError, match="no such file"):
        read_results(tmp_path / "nothing")


def test_parts_that_lack_what_they_need_are_refused(tiny):
    model, tokenizer = tiny
    tokens = torch.arange(32).reshape(2, 16)
    for told, message in [
        ({"prompts": ["a"]}, "reference"),
        ({"positions": True, "timed": True}, "need tokens"),
        ({"stride": 4, "tokens": tokens, "attention_mask": torch.ones_like(tokens)}, "without padding"),
        ({"against": {}, "tokens": tokens}, "name the tasks"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(model, tokenizer, **told)


def test_nothing_to_do_and_a_missing_tokenizer_are_refused(tiny):
    model, _ = tiny
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(model)
    with pytest.raises(InputError, match="tokenizer"):
        evaluate(model, tasks=["piqa"])
