"""The work of each kind of step; every function fills one folder."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from preln.base.errors import InputError
from preln.base.files import write_json, write_parquet
from preln.evaluate import perplexity
from preln.experiment.lab import Lab
from preln.experiment.sections import Cut, HealRun, Hypothesis
from preln.experiment.statistics.losses import DENSE_ROW, damages
from preln.heal import Examples, Recipe, get_recipe, train
from preln.heal.cost.operations import operations
from preln.models import anatomy, view
from preln.probe import probe_tables, write_probe
from preln.prune import depends_on_size, leave_one_out, make_plan, score, write_plan


def verify_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Decide and property-test the theorems: ``ledger.json``."""
    from preln.testing.verify import verify

    profile = lab.study.theory
    assert profile != "none"  # such a study has no such step
    verify(profile=profile).write(folder / "ledger.json")


def probe_step(lab: Lab, folder: Path, work: Path) -> None:
    """Measure the unpruned model, in six passes or more: ``grad_param`` resamples passes."""
    tokens = lab.tokens["calibration"]
    told = {"batch_size": _probe_batch(tokens), "seed": lab.study.seed, "resume": work / "probe"}
    result = probe_tables(lab.model, tokens, **told)
    write_probe(result, folder)


def _probe_batch(tokens: Any) -> int:
    return min(4, max(1, len(tokens) // 6))


def score_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Score every block under every metric, on the calibration tokens: ``scores.parquet``."""
    table = score(lab.model, lab.tokens["calibration"], lab.study.prune.metrics, seed=lab.study.seed)
    write_parquet(folder / "scores.parquet", table)


def damage_step(lab: Lab, folder: Path, _work: Path) -> None:
    """Loss without each single block, on tokens that chose nothing: ``damage.parquet``."""
    table = leave_one_out(lab.model, lab.tokens["evaluation"])
    write_parquet(folder / "sequences.parquet", table)
    write_parquet(folder / "damage.parquet", damages(table, seed=lab.study.seed))


def jacobians_step(lab: Lab, folder: Path, work: Path, *, windows: int) -> None:
    """Measure sigma(J - I) of every block on the first calibration windows, as a probe of its own."""
    tokens = lab.tokens["calibration"][:windows]
    told = {"batch_size": 1, "seed": lab.study.seed, "pairs": False, "resume": work / "probe"}
    write_probe(probe_tables(lab.model, tokens, measures=["update_sigma"], **told), folder)


def prune_step(lab: Lab, folder: Path, _work: Path, *, cut: Cut) -> None:
    """Choose blocks by one metric, and measure the model without them: ``plan.yaml``, ``result.json``."""
    metric, protect, drop = cut.metric, cut.protect, cut.count(lab.num_blocks)
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


def shift_step(lab: Lab, folder: Path, work: Path, *, pruned: str) -> None:
    """Measure the parameters' gradients of one pruned model, as the probe did those of the whole one."""
    tokens = lab.tokens["calibration"]
    result = probe_tables(
        lab.pruned(pruned),
        tokens,
        measures=["grad_param", "grad_tail_share"],
        batch_size=_probe_batch(tokens),
        seed=lab.study.seed,
        pairs=False,
        resume=work / "probe",
    )
    write_probe(result, folder)


def heal_step(lab: Lab, folder: Path, work: Path, *, pruned: str, run: HealRun) -> None:
    """Heal one pruned model by one recipe and measure it; a killed run continues from ``work``."""
    from safetensors.torch import save_file

    before = lab.result(f"prune-{pruned}")
    recipe, entry = get_recipe(run.recipe), run.entry
    settings = recipe.settings_for(**entry.settings(), learning_rate=run.learning_rate, seed=run.seed)
    result = train(
        lab.pruned(pruned),
        lab.tokens["healing"],
        validation=lab.tokens["healing_validation"],
        recipe=recipe,
        settings=settings,
        directory=work / "training",
        cache=lab.cache(pruned),
        teacher=lab.model if recipe.teacher else None,
        drop=before["drop"],
    )
    began = time.perf_counter()
    measured = perplexity(result.model, lab.tokens["evaluation"], seed=lab.study.seed)
    forward = (time.perf_counter() - began) / lab.tokens["evaluation"].numel()
    if entry.keep_weights:
        save_file({k: v.contiguous() for k, v in result.trained.items()}, folder / "weights.safetensors")
    write_parquet(folder / "training.parquet", result.history)
    write_parquet(folder / "sequences.parquet", measured.sequences)
    taken = ("learning_rate", "trainable_parameters", "total_parameters", "steps", "tokens", "seconds")
    write_json(
        folder / "result.json",
        {
            "metric": before["metric"],
            "drop": before["drop"],
            "recipe": run.name,
            "group": run.group,
            "base_recipe": run.recipe,
            "seed": run.seed,
            **{key: result.manifest[key] for key in (*taken, "peak_memory_bytes", "cache")},
            "forward_seconds_per_token": forward,
            "operations": _operations(lab, pruned, recipe, result.manifest),
            "validation_before": result.manifest["loss_before"],
            "validation_after": result.manifest["loss_after"],
            "loss_before": before["loss"],
            "loss_after": measured.loss,
            "low": measured.low,
            "high": measured.high,
            "perplexity": measured.as_dict()["perplexity"],
        },
    )


def _operations(lab: Lab, pruned: str, recipe: Recipe, told: dict[str, Any]) -> float | None:
    """Operations of a run's updates and of the pass that stored states; None where shapes do not tell."""
    tokens = lab.tokens["healing"]
    if isinstance(tokens, Examples):
        length, supervised = tokens.input_ids.shape[1], Fraction(tokens.supervised, tokens.input_ids.numel())
    else:
        length = tokens.shape[1]
        supervised = Fraction(length - 1, length)
    try:
        each = operations(
            lab.pruned(pruned),
            recipe,
            length=length,
            supervised=supervised,
            cached=bool(told["cache"]),
            drop=lab.result(f"prune-{pruned}")["drop"] if recipe.needs_drop else None,
            teacher=lab.model if recipe.teacher else None,
        )
    except InputError:
        return None
    return (each.total + (each.prefix if told["cache"] else 0.0)) * told["tokens"]


def decide_step(lab: Lab, folder: Path, _work: Path, *, hypotheses: tuple[Hypothesis, ...]) -> None:
    """Decide every hypothesis of the study from the stored tables: ``verdicts.json``."""
    from preln.experiment.statistics.verdicts import decide

    verdicts = [decide(hypothesis, lab) for hypothesis in hypotheses]
    write_json(folder / "verdicts.json", {"verdicts": verdicts})
