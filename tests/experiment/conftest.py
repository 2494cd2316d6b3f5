import gzip
import json
import random

import pytest
import yaml

WORDS = ["the", "block", "norm", "adds", "a", "branch", "to", "stream", "each", "token", "reads", "wrote"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small made-up corpus with some structure for a model to learn."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(120):
            text = ". ".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(8))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def tokens(corpus, sequences, split="train", seed=0):
    return {"source": str(corpus), "sequences": sequences, "length": 32, "split": split, "seed": seed}


@pytest.fixture
def study_values(corpus):
    return {
        "name": "small",
        "question": "does it run?",
        "model": "tiny:llama:6",
        "theory": "none",
        "data": {
            "calibration": tokens(corpus, 4),
            "evaluation": tokens(corpus, 4, "validation"),
            "healing": tokens(corpus, 12, seed=1),
            "healing_validation": tokens(corpus, 2, "validation", 1),
        },
        "prune": {"metrics": ["reverse", "block_influence"], "drop": [2]},
        "heal": [
            {
                "recipe": "partial-3",
                "models": ["reverse-2", "block_influence-2"],
                "learning_rate": 1e-5,
                "steps": 4,
                "batch_size": 2,
                "checkpoint_every": 1,
            },
            {"recipe": "lora", "models": ["reverse-2"], "learning_rate": 1e-5, "steps": 4, "batch_size": 2},
        ],
        "hypotheses": [
            {
                "id": "HYP-ATTEN-HIDDEN",
                "statistic": "spearman_depth",
                "direction": "below",
                "threshold": -0.5,
            },
            {
                "id": "HYP-ATTEN-PARAM",
                "statistic": "spearman_depth",
                "direction": "below",
                "threshold": -0.5,
            },
            {
                "id": "HYP-SIGMA",
                "statistic": "largest_share_le_one",
                "direction": "below",
                "threshold": 0.01,
            },
            {
                "id": "HYP-B-LT1",
                "statistic": "largest_mean_sigma",
                "direction": "below",
                "threshold": 1.0,
            },
            {
                "id": "HYP-PREDICTS",
                "statistic": "spearman_first_order",
                "direction": "above",
                "threshold": 0.5,
            },
            {
                "id": "HYP-REVERSE-RAW",
                "statistic": "loss_gap_to_best",
                "direction": "below",
                "threshold": 0.0,
            },
            {
                "id": "HYP-REVERSE-HEALED",
                "statistic": "loss_gap_to_best",
                "direction": "below",
                "threshold": 0.0,
            },
            {
                "id": "HYP-LAST",
                "statistic": "last_minus_worst_deep",
                "direction": "above",
                "threshold": 0.0,
            },
            {
                "id": "HYP-PARTIAL",
                "statistic": "loss_difference",
                "direction": "below",
                "threshold": 0.0,
            },
        ],
    }


@pytest.fixture
def write_yaml(tmp_path):
    def write(values, name="study.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
