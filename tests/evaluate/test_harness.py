from __future__ import annotations

import copy
import json
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate import evaluate, evaluate_tasks

from .conftest import piqa_rows, winogrande_rows, write_benchmark

pytestmark = pytest.mark.integration
ALL = ["piqa", "arc_easy", "hellaswag", "winogrande", "openbookqa"]


def _log_likelihood(model, tokenizer, context, continuation):
    """Sum of log p of the continuation's tokens after the context, one request at a time, in float64."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
    total = 0.0
    for i, token in enumerate(after, start=len(before) - 1):
        total += float(logits[i, token] - torch.log(torch.exp(logits[i]).sum()))
    return total


def test_piqa_agrees_with_likelihoods_computed_from_the_definition(tiny, rows_folder):
    model, tokenizer = tiny
    result = evaluate_tasks(model, tokenizer, ["piqa"], source=rows_folder)
    plain, by_length = [], []
    for row in piqa_rows(12):
        options = [row["sol1"], row["sol2"]]
        prompt = f"Question: {row['goal']}\nAnswer:"
        scores = np.array([_log_likelihood(model, tokenizer, prompt, f" {text}") for text in options])
        plain.append(float(scores.argmax() == row["label"]))
        by_length.append(float((scores / [len(text) for text in options]).argmax() == row["label"]))
    assert result["documents"]["acc"].tolist() == plain
    assert result["documents"]["acc_norm"].tolist() == by_length
    row = result["tasks"]["piqa"]
    assert row["n"] == 12
    assert row["acc"] == pytest.approx(np.mean(plain))
    assert row["acc_norm"] == pytest.approx(np.mean(by_length))
    assert row["acc_stderr"] == pytest.approx(np.std(plain, ddof=1) / math.sqrt(12))
    assert 0 < sum(plain) < 12  # all right or all wrong would show little


def test_winogrande_scores_the_rest_of_the_sentence_after_each_option(tiny, rows_folder):
    model, tokenizer = tiny
    result = evaluate_tasks(model, tokenizer, ["winogrande"], source=rows_folder, limit=4)
    expected = []
    for row in winogrande_rows(4):
        start, rest = row["sentence"].split("_")
        scores = [
            _log_likelihood(model, tokenizer, start + option, f" {rest.strip()}")
            for option in (row["option1"], row["option2"])
        ]
        expected.append(float(np.argmax(scores) == int(row["answer"]) - 1))
    assert result["documents"]["acc"].tolist() == expected
    assert "acc_norm" not in result["tasks"]["winogrande"]
    record = json.dumps(result["lm_eval"])
    assert "<function doc_to_text>" in record and " at 0x" not in record  # no two processes agree on it


def test_swapped_labels_turn_right_into_wrong(tiny, rows_folder, tmp_path):
    model, tokenizer = tiny
    rows = [{**row, "label": 1 - row["label"]} for row in piqa_rows(12)]
    write_benchmark(tmp_path / "piqa", "plain_text", {"validation": rows})
    right = evaluate_tasks(model, tokenizer, ["piqa"], source=rows_folder)["tasks"]["piqa"]["acc"]
    wrong = evaluate_tasks(model, tokenizer, ["piqa"], source=tmp_path)["tasks"]["piqa"]["acc"]
    assert right + wrong == pytest.approx(1.0)


@pytest.fixture(scope="module")
def all_tasks(tiny, rows_folder):
    return evaluate_tasks(*tiny, ALL, limit=4, source=rows_folder)


def test_five_benchmarks_run_from_a_folder_that_has_no_training_split(all_tasks):
    result = all_tasks
    assert list(result["tasks"]) == ALL
    assert [row["n"] for row in result["tasks"].values()] == [4, 4, 4, 4, 3]
    accuracies = [row["acc"] for row in result["tasks"].values()]
    assert result["mean_acc"] == pytest.approx(sum(accuracies) / 5)
    frame = result["documents"].groupby("task")["acc"].mean()
    for name, row in result["tasks"].items():
        assert row["acc"] == pytest.approx(frame[name])


def test_the_source_and_the_split_are_recorded_without_paths(all_tasks, rows_folder):
    source = all_tasks["source"]
    assert source["arc_easy"]["split"] == "test"
    assert source["openbookqa"]["split"] == "validation"  # its test split is absent from the folder
    assert {entry["kind"] for entry in source.values()} == {"folder"}
    assert len({entry["sha256"] for entry in source.values()}) == 5
    assert str(rows_folder) not in str(source)


def test_batch_size_changes_no_outcome(tiny, rows_folder, all_tasks):
    one = evaluate_tasks(*tiny, ALL, limit=4, source=rows_folder, batch_size=1)
    assert one["documents"].equals(all_tasks["documents"])


def test_the_model_the_tokenizer_and_random_states_are_left_as_they_were(tiny, rows_folder):
    model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    try:
        evaluate_tasks(model, tokenizer, ["piqa"], limit=2, source=rows_folder)
        assert model.training
    finally:
        model.eval()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert tokenizer.pad_token is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_pruned_model_with_its_own_head_keeps_that_head(rows_folder, tiny):
    from preln.models import drop_blocks, tiny_model, untie_head

    _, tokenizer = tiny
    small = untie_head(drop_blocks(tiny_model("gpt2"), [2]))
    with torch.no_grad():
        small.lm_head.weight.mul_(-1.0)
    before = small.lm_head.weight.clone()
    result = evaluate_tasks(small, tokenizer, ["piqa"], limit=2, source=rows_folder)
    assert result["tasks"]["piqa"]["n"] == 2
    assert torch.equal(small.lm_head.weight, before)
    assert not torch.equal(small.lm_head.weight, small.transformer.wte.weight)


def test_nothing_is_printed(tiny, rows_folder, capfd):
    evaluate_tasks(*tiny, ["piqa"], limit=2, source=rows_folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_a_single_document_has_no_standard_error(tiny, rows_folder):
    result = evaluate_tasks(*tiny, ["piqa"], limit=1, source=rows_folder)
    assert result["tasks"]["piqa"]["acc_stderr"] is None


def test_unknown_tasks_are_refused_with_close_names(tiny):
    with pytest.raises(InputError, match=r"'arc_eazy': no such lm-eval task.*arc_easy"):
        evaluate_tasks(*tiny, ["piqa", "arc_eazy"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tasks": []}, "at least one"),
        ({"tasks": ["piqa", "piqa"]}, "named twice"),
        ({"limit": 0}, "limit"),
        ({"limit": 1.5}, "limit"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(tiny, rows_folder, keywords, message):
    settings = {"tasks": ["piqa"], "source": rows_folder, **keywords}
    with pytest.raises(InputError, match=message):
        evaluate_tasks(*tiny, **settings)


def test_rows_without_the_columns_are_refused_in_one_line(tiny, tmp_path):
    write_benchmark(tmp_path / "piqa", "plain_text", {"validation": [{"question": "a", "label": 0}]})
    with pytest.raises(InputError, match="piqa: the rows cannot be used") as caught:
        evaluate_tasks(*tiny, ["piqa"], source=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_nothing_to_evaluate_on_is_refused(tiny, tmp_path):
    write_benchmark(tmp_path / "piqa", "plain_text", {"train": piqa_rows(2)})
    with pytest.raises(InputError, match="none to evaluate on"):
        evaluate_tasks(*tiny, ["piqa"], source=tmp_path)


def test_not_a_number_is_refused_rather_than_counted_as_the_first_option(tiny, rows_folder):
    model, tokenizer = tiny
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"piqa: document 0 .* NaN"):
        evaluate_tasks(broken, tokenizer, ["piqa"], limit=2, source=rows_folder)


def test_real_rows_run_where_they_are_at_hand(tiny):
    import os

    if not os.environ.get("PRELN_DATA"):
        pytest.skip("PRELN_DATA does not name a folder of real benchmark rows")
    result = evaluate(*tiny, ["piqa", "arc_easy", "winogrande", "mmlu_anatomy"], limit=2, source="folder")
    assert [row["n"] for row in result["tasks"].values()] == [2, 2, 2, 2]
    assert result["source"]["mmlu_anatomy"]["split"] == "test"


def test_tasks_may_have_limits_of_their_own(tiny, rows_folder):
    model, tokenizer = tiny
    names = ["piqa", "winogrande"]
    mixed = evaluate_tasks(model, tokenizer, names, source=rows_folder, limit={"piqa": 3})["documents"]
    some, whole = (
        evaluate_tasks(model, tokenizer, names, source=rows_folder, limit=limit)["documents"]
        for limit in (3, None)
    )
    wanted = pd.concat([some[some["task"] == "piqa"], whole[whole["task"] == "winogrande"]])
    pd.testing.assert_frame_equal(mixed, wanted.reset_index(drop=True))
    with pytest.raises(InputError, match="'boolq' is none of the tasks"):
        evaluate_tasks(model, tokenizer, names, source=rows_folder, limit={"boolq": 3})
    with pytest.raises(InputError, match="at least 1"):
        evaluate_tasks(model, tokenizer, names, source=rows_folder, limit={"piqa": 0})
