"""Studies with shares, protections, rows, Jacobians, known answers and texts: a tiny one from end to end."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from preln import load_model
from preln.base.errors import InputError
from preln.data.gold import GoldAnswer
from preln.evaluate import gold_bits, sentences
from preln.experiment import asking, read_study, run_study, study_schema
from preln.heal.cost.operations import operations
from preln.models import drop_blocks
from preln.prune import read_plan

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
GOLD = {
    "jeopardy": [GoldAnswer(i, f"Question {i}\nAnswer:", f" {word}") for i, word in enumerate("abcdef")],
    "gsm8k": [GoldAnswer(i, f"Solve {i}:", f" first {i}, then {i + 1}") for i in range(6)],
}


@pytest.fixture
def asked_values(study_values, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Say {i}:", "completion": f" {i} was asked for"} for i in range(400)]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    study_values["data"]["healing"] = {"rows": str(rows), "sequences": 6, "length": 192}
    study_values["prune"] = {
        "metrics": ["reverse", "block_influence"],
        "drop": [0.34],
        "protect": ["none", "uidl"],
    }
    study_values["jacobians"] = 3
    study_values["heal"] = [
        {
            "recipe": "partial-1",
            "models": ["reverse-0.34"],
            "epochs": 1.0,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
        }
    ]
    names = ["dense", "reverse-0.34", "reverse-0.34-partial-1"]
    study_values["answers"] = {
        "groups": {"knowledge": ["jeopardy"], "reasoning": ["gsm8k"]},
        "limit": 4,
        "models": names,
    }
    study_values["writing"] = {"prompts": 3, "prompt_tokens": 4, "new_tokens": 5, "models": names}
    study_values["hypotheses"] = [
        {"id": "HYP-SIMILARITY", "statistic": "deep_minus_shallow", "direction": "below", "threshold": 0.0},
        {"id": "HYP-IDENTITY", "statistic": "spearman_depth", "direction": "below", "threshold": -0.5},
        {
            "id": "HYP-HALF",
            "statistic": "healed_loss_gap",
            "direction": "below",
            "threshold": 0.1,
            "model": "reverse-0.34",
        },
        {"id": "HYP-REASONING", "statistic": "excess_rise", "direction": "above", "threshold": 0.0},
    ]
    return study_values


@pytest.fixture
def offline(monkeypatch):
    """Answers and a sentence model without packages."""
    monkeypatch.setattr(asking, "load_gold", lambda task, limit: GOLD[task][:limit])

    class Letters:
        def embed(self, texts):
            return torch.tensor([[text.count(c) + 0.1 for c in "abcdefgh "] for text in texts])

    monkeypatch.setattr(sentences, "load_sentence_encoder", Letters)


def test_a_study_asks_its_models_and_decides(asked_values, write_yaml, tmp_path, offline):
    study, out = read_study(write_yaml(asked_values)), tmp_path / "run"
    run_study(study, out)
    free, kept = (read_plan(out / f"prune-reverse-0.34{end}" / "plan.yaml").drop for end in ("", "-uidl"))
    assert (list(free), list(kept)) == (
        [4, 5],
        [3, 4],
    )  # two of six; the last one stays where it is protected
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["healing"]["shape"][0] == 6
    result = json.loads((out / "heal-reverse-0.34-partial-1" / "result.json").read_text())
    assert result["steps"] == 3  # one epoch of six windows in twos

    model, tokenizer = load_model("tiny:llama:6")
    small = drop_blocks(model, [4, 5])
    share = pd.read_parquet(out / "heal-reverse-0.34-partial-1" / "training.parquet")
    assert result["tokens"] == share["tokens"].max()
    full = operations(small, "full", length=167, supervised=1).total * result["tokens"]
    assert 0 < result["operations"] < full
    direct = gold_bits(drop_blocks(model, [4, 5]), tokenizer, {k: v[:4] for k, v in GOLD.items()})
    stored = pd.read_parquet(out / "answer-prune-reverse-0.34" / "documents.parquet")
    pd.testing.assert_frame_equal(stored, direct)
    whole = pd.read_parquet(out / "answer-dense" / "documents.parquet")

    verdicts = {v["id"]: v for v in json.loads((out / "decide" / "verdicts.json").read_text())["verdicts"]}
    assert all(v["status"] != "untested" for v in verdicts.values())
    assert all(v["interval"][0] <= v["value"] <= v["interval"][1] for v in verdicts.values())
    bits = {
        name: [float(frame.loc[frame["task"] == task, "bits"].sum()) for task in ("jeopardy", "gsm8k")]
        for name, frame in (("dense", whole), ("pruned", stored))
    }
    rises = [math.log(after / before) for before, after in zip(bits["dense"], bits["pruned"], strict=True)]
    assert verdicts["HYP-REASONING"]["value"] == pytest.approx(rises[1] - rises[0])
    assert "repeated 4-grams" in verdicts["HYP-REASONING"]["note"]
    losses = pd.read_parquet(out / "damage" / "sequences.parquet").query("layer == -1")
    dense = (losses["loss"] * losses["tokens"]).sum() / losses["tokens"].sum()
    assert verdicts["HYP-HALF"]["value"] == pytest.approx(result["loss_after"] - dense)

    texts = json.loads((out / "write-dense" / "written.json").read_text())
    assert len(texts["ids"]) == 3
    beside = pd.read_parquet(out / "write-prune-reverse-0.34" / "continuations.parquet")
    assert list(beside["text_reference"]) == texts["texts"]

    ran = run_study(study, out)
    assert ran["ran"] == []
    asked_values["answers"]["limit"] = 5
    ran = run_study(read_study(write_yaml(asked_values)), out)["ran"]
    names = ("dense", "prune-reverse-0.34", "heal-reverse-0.34-partial-1")
    assert ran == [*(f"answer-{name}" for name in names), "decide"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jacobians": 9}, "more calibration sequences"),
        ({"heal": [{"recipe": "lora", "models": ["reverse-0.34"], "batch_size": 1}]}, "steps or epochs"),
        (
            {
                "heal": [
                    {"recipe": "lora", "models": ["reverse-0.34"], "steps": 1, "epochs": 1, "batch_size": 1}
                ]
            },
            "steps or epochs",
        ),
        (
            {
                "heal": [
                    {
                        "recipe": "lora",
                        "models": ["reverse-0.34"],
                        "steps": 1,
                        "batch_size": 1,
                        "label": "../x",
                    }
                ]
            },
            "letters, digits",
        ),
        (
            {
                "heal": [
                    {
                        "recipe": "uidl",
                        "models": ["reverse-0.34"],
                        "steps": 1,
                        "batch_size": 1,
                        "label": "uidl",
                    }
                ]
            },
            "also a pruned model",
        ),
        ({"writing": {"prompts": 2, "models": ["reverse-0.34"]}}, "name dense first"),
        ({"writing": {"prompts": 9, "models": ["dense"]}}, "ask for fewer"),
        ({"answers": {"groups": {"a": ["gsm9k"]}, "limit": 2, "models": ["dense"]}}, "gsm9k"),
        (
            {"answers": {"groups": {"a": ["gsm8k"]}, "limit": 2, "models": ["nobody"]}},
            "no model of this study",
        ),
        ({"prune": {"metrics": ["reverse"], "drop": [1.5]}}, r"prune\.drop"),
        ({"prune": {"metrics": ["reverse"], "drop": [2], "protect": ["none", "last"]}}, "preset 'last'"),
        ({"resources": {"heel": {"gpus": 1.0}}}, r"resources\.heel"),
    ],
)
def test_what_makes_no_sense_is_refused(asked_values, write_yaml, change, message):
    kept = {key: asked_values[key] for key in ("name", "question", "model", "data", "prune", "theory")}
    with pytest.raises(InputError, match=message):
        read_study(write_yaml(kept | change))


def test_too_few_rows_are_refused(asked_values, write_yaml, tmp_path):
    asked_values["data"]["healing"]["sequences"] = 5000
    with pytest.raises(InputError, match=r"data\.healing: the rows of .* make \d+ windows of 192"):
        run_study(read_study(write_yaml(asked_values)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_schema_in_the_repository_is_the_code_s():
    assert (ROOT / "experiments" / "study.schema.json").read_text(encoding="utf-8") == study_schema()


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("smollm2-135m.yaml")), ids=str)
def test_shipped_studies_are_well_formed(path):
    study = read_study(path)
    assert study.hypotheses and study.name
    assert yaml.safe_load(path.read_text())["schema_version"] == 1
