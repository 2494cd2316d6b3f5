"""The work of each kind of step; every function fills one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from preln.base.files import write_json, write_parquet
from preln.evaluate import evaluate_tasks, perplexity, write_results
from preln.experiment.lab import Lab
from preln.experiment.losses import DENSE_ROW, damages
from preln.experiment.study import DENSE, Healing, Hypothesis, healed_name, pruned_name
from preln.heal import get_recipe, train
from preln.models import anatomy, view
from preln.probe import probe_tables, write_probe
from preln.prune import depends_on_size, leave_one_out, make_plan, score, write_plan


def verify_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Decide and property-test the theorems: ``ledger.json``."""
    from preln.testing.verify import verify

    verify(profile=lab.study.theory).write(folder / "ledger.json")


def probe_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Measure the unpruned model, in six passes or more: ``grad_param`` resamples passes."""
    tokens = lab.tokens["calibration"]
    batch_size = min(4, max(1, len(tokens) // 6))
    result = probe_tables(lab.model, tokens, batch_size=batch_size, seed=lab.study.seed)
    write_probe(result, folder)


def score_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Score every block under every metric, on the calibration tokens: ``scores.parquet``."""
    table = score(lab.model, lab.tokens["calibration"], lab.study.prune.metrics, seed=lab.study.seed)
    write_parquet(folder / "scores.parquet", table)


def damage_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Loss without each single block, on tokens that chose nothing: ``damage.parquet``."""
    table = leave_one_out(lab.model, lab.tokens["evaluation"])
    write_parquet(folder / "sequences.parquet", table)
    write_parquet(folder / "damage.parquet", damages(table, seed=lab.study.seed))


def prune_step(lab: Lab, folder: Path, _work: Path, *, metric: str, drop: int) -> None:
    """Choose blocks by one metric, and measure the model without them: ``plan.yaml``, ``result.json``."""
    protect = lab.study.prune.protect
    if depends_on_size(metric):  # the stored scores are for a size of their own
        told = {"seed": lab.study.seed, "size": drop, "protect": protect}
        scores = score(lab.model, lab.tokens["calibration"], [metric], **told)
    else:
        scores = pd.read_parquet(lab.path("score", "scores.parquet"))
    plan = make_plan(
        scores,
        metric,
        drop=drop,
        protect=protect,
        tokens=lab.identity["data"]["calibration"]["sha256"],
        model=lab.study.model,
    )
    write_plan(plan, folder / "plan.yaml")
    blocks = anatomy(lab.model).blocks
    kept = view(lab.model, [blocks[i] for i in plan.keep])
    measured = perplexity(kept, lab.tokens["evaluation"], seed=lab.study.seed)
    whole = pd.read_parquet(lab.path("damage", "sequences.parquet"))
    whole = whole[whole["layer"] == DENSE_ROW]
    write_parquet(folder / "sequences.parquet", measured.sequences)
    numbers = measured.as_dict()
    write_json(
        folder / "result.json",
        {
            "metric": metric,
            "drop": list(plan.drop),
            "num_blocks": plan.num_blocks,
            **{key: numbers[key] for key in ("loss", "low", "high", "perplexity", "tokens")},
            "dense_loss": float(np.average(whole["loss"], weights=whole["tokens"])),
        },
    )


def heal_step(lab: Lab, folder: Path, work: Path, *, pruned: str, healing: Healing) -> None:
    """Heal one pruned model by one recipe and measure it; a killed run continues from ``work``."""
    from safetensors.torch import save_file

    before = lab.result(f"prune-{pruned}")
    settings = get_recipe(healing.recipe).settings_for(
        steps=healing.steps,
        batch_size=healing.batch_size,
        learning_rate=healing.learning_rate,
        checkpoint_every=healing.checkpoint_every,
        seed=lab.study.seed,
    )
    small = lab.pruned(pruned)
    result = train(
        small,
        lab.tokens["healing"],
        validation=lab.tokens["healing_validation"],
        recipe=healing.recipe,
        settings=settings,
        directory=work / "training",
    )
    measured = perplexity(result.model, lab.tokens["evaluation"], seed=lab.study.seed)
    save_file({k: v.contiguous() for k, v in result.trained.items()}, folder / "weights.safetensors")
    write_parquet(folder / "training.parquet", result.history)
    write_parquet(folder / "sequences.parquet", measured.sequences)
    taken = ("learning_rate", "trainable_parameters", "total_parameters", "steps", "tokens", "seconds")
    write_json(
        folder / "result.json",
        {
            "metric": before["metric"],
            "drop": before["drop"],
            "recipe": healing.name,
            "base_recipe": healing.recipe,
            **{key: result.manifest[key] for key in (*taken, "peak_memory_bytes")},
            "loss_before": before["loss"],
            "loss_after": measured.loss,
            "low": measured.low,
            "high": measured.high,
            "perplexity": measured.as_dict()["perplexity"],
        },
    )


def evaluate_step(lab: Lab, folder: Path, _work: Path, *, name: str) -> None:
    """Put one model of the study through the tasks: ``results.json``, lm-eval's own file beside it."""
    tasks = lab.study.tasks
    assert tasks is not None  # only studies with tasks have this step
    result = evaluate_tasks(
        model_by_name(lab, name), lab.tokenizer, tasks.names, limit=tasks.limit, seed=lab.study.seed
    )
    write_results({**result, "model": step_of_model(lab, name)}, folder)


def model_by_name(lab: Lab, name: str) -> Any:
    """The unpruned, a pruned or a healed model of the study."""
    if name == DENSE:
        return lab.model
    for entry in lab.study.heal:
        for pruned in entry.models:
            if healed_name(pruned, entry) == name:
                return lab.healed(pruned, entry)
    return lab.pruned(name)


def step_of_model(lab: Lab, name: str) -> str:
    """The step that made a model: ``dense``, ``prune-…`` or ``heal-…``."""
    if name == DENSE:
        return DENSE
    study = lab.study
    cut = {pruned_name(m, n) for m in study.prune.metrics for n in study.prune.drop}
    return f"prune-{name}" if name in cut else f"heal-{name}"


def decide_step(lab: Lab, folder: Path, _work: Path, *, hypotheses: tuple[Hypothesis, ...]) -> None:
    """Decide every hypothesis of the study from the stored tables: ``verdicts.json``."""
    from preln.experiment.verdicts import decide

    verdicts = [decide(hypothesis, lab) for hypothesis in hypotheses]
    write_json(folder / "verdicts.json", {"verdicts": verdicts})
