"""What a study asks of its models: tasks, the bits of known answers, and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preln.base.files import read_json, write_json, write_parquet
from preln.data import load_gold
from preln.evaluate import evaluate_tasks, gold_bits, write_results
from preln.evaluate.generation import Continuations, compare_generation, write_on
from preln.experiment.lab import Lab
from preln.experiment.outline import made_by
from preln.experiment.study import DENSE

WRITTEN = "written.json"


def evaluate_step(lab: Lab, folder: Path, _work: Path, *, name: str) -> None:
    """Put one model of the study through the tasks: ``results.json``, lm-eval's own file beside it."""
    tasks = lab.study.tasks
    assert tasks is not None  # only studies with tasks have this step
    result = evaluate_tasks(
        model_by_name(lab, name), lab.tokenizer, tasks.names, limit=tasks.limit, seed=lab.study.seed
    )
    write_results({**result, "model": made_by(lab.study, name)}, folder)


def model_by_name(lab: Lab, name: str) -> Any:
    """The unpruned, a pruned or a healed model of the study."""
    pruned, run = lab.study.origin(name)
    if pruned is None:
        return lab.model
    return lab.pruned(pruned) if run is None else lab.healed(pruned, run)


def answer_step(lab: Lab, folder: Path, _work: Path, *, name: str) -> None:
    """Bits a byte that one model needs for known answers: ``documents.parquet``, a row a document."""
    asked = lab.study.answers
    assert asked is not None  # only studies with answers have this step
    tasks = {task: load_gold(task, limit=asked.limit) for names in asked.groups.values() for task in names}
    table = gold_bits(model_by_name(lab, name), lab.tokenizer, tasks)
    write_parquet(folder / "documents.parquet", table)
    means: Any = table.groupby("task", sort=False)["bits_per_byte"].mean()
    write_json(
        folder / "results.json", {"model": name, "bits_per_byte": {k: float(v) for k, v in means.items()}}
    )


def write_step(lab: Lab, folder: Path, _work: Path, *, name: str) -> None:
    """Greedy continuations of one model, beside those of the unpruned one: ``written.json``, tables."""
    asked = lab.study.writing
    assert asked is not None  # only studies with writing have this step
    prompts = lab.tokens["evaluation"][: asked.prompts, : asked.prompt_tokens]
    wrote = write_on(model_by_name(lab, name), lab.tokenizer, prompts, new_tokens=asked.new_tokens)
    if name != DENSE:
        reference = Continuations(**read_json(lab.path(f"write-{DENSE}", WRITTEN)))
        table, summary = compare_generation(
            wrote, reference, lab.tokenizer, prompts, new_tokens=asked.new_tokens, seed=lab.study.seed
        )
        write_parquet(folder / "continuations.parquet", table)
        write_parquet(folder / "summary.parquet", summary)
    write_json(folder / WRITTEN, vars(wrote))
