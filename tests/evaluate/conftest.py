"""A made-up folder of benchmark rows with the hub's columns, so that no test needs real data."""

from __future__ import annotations

import json

import pytest

from preln.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Rows that tests make up are converted in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny():
    return tiny_model("llama"), tiny_tokenizer()


def write_benchmark(folder, config, splits):
    folder.mkdir(parents=True)
    card = f"---\nconfigs:\n- config_name: {config}\n  default: true\n  data_files:\n"
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        card += f"  - split: {split}\n    path: {split}.jsonl\n"
    (folder / "README.md").write_text(card + "---\nMade up.\n", encoding="utf-8")


WORDS = (
    "stir the soup",
    "fold a map",
    "wash one window",
    "paint the old door",
    "sharpen a pencil",
    "mend it",
)


def piqa_rows(n):
    return [
        {
            "goal": f"How do you {WORDS[i % 6]} {i} times?",
            "sol1": f"Slowly, with {WORDS[(i + 1) % 6]}.",
            "sol2": f"Quickly and then {WORDS[(i * i + 2) % 6]} for {i} hours.",
            "label": i % 2,
        }
        for i in range(n)
    ]


def winogrande_rows(n):
    return [
        {
            "sentence": f"The cup did not fit the box {i} because the _ was too {WORDS[i % 6]}.",
            "option1": "cup",
            "option2": f"box {i}",
            "answer": str(1 + i % 2),
        }
        for i in range(n)
    ]


def choice_rows(n, field):
    labels = [["A", "B", "C", "D"], ["1", "2", "3", "4"]]
    return [
        {
            "id": f"made-up-{i}",
            field: f"Which of these would {WORDS[i % 6]} number {i}?",
            "choices": {"text": [f"{WORDS[(i + k) % 6]} {k}" for k in range(4)], "label": labels[i % 2]},
            "answerKey": labels[i % 2][(3 * i) % 4],
        }
        for i in range(n)
    ]


def hellaswag_rows(n):
    return [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": f"Someone begins to {WORDS[i % 6]}.",
            "ctx_b": "then she",
            "ctx": f"Someone begins to {WORDS[i % 6]}. then she",
            "endings": [f"tries to {WORDS[(i + k) % 6]} [title] {k}." for k in range(4)],
            "source_id": "made-up",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmark(root / "piqa", "plain_text", {"validation": piqa_rows(12)})
    write_benchmark(root / "winogrande", "winogrande_xl", {"validation": winogrande_rows(8)})
    write_benchmark(root / "hellaswag", "default", {"validation": hellaswag_rows(6)})
    write_benchmark(root / "openbookqa", "main", {"validation": choice_rows(3, "question_stem")})
    write_benchmark(
        root / "arc",
        "ARC-Easy",
        {"validation": choice_rows(3, "question"), "test": choice_rows(6, "question")},
    )
    return root
