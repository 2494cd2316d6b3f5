"""What a pruned model keeps: loss and accuracy after healing, and which kinds of answer suffer most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.base.stats import resample_indices
from preln.evaluate import read_results
from preln.evaluate.paired import groups_of, mean_difference
from preln.experiment.sections import healed_name
from preln.experiment.statistics.damage import loss_table
from preln.experiment.statistics.decisions import Measured
from preln.experiment.statistics.healed import best, healed
from preln.experiment.statistics.losses import DENSE_ROW
from preln.experiment.statistics.registry import MissingData, resampled_losses, statistic
from preln.experiment.study import DENSE

if TYPE_CHECKING:
    from preln.experiment.lab import Lab

KNOWLEDGE, REASONING = "knowledge", "reasoning"


@statistic(
    "HYP-HALF",
    "healed_loss_gap",
    "loss of a pruned model after its best healing minus the unpruned model's, nats",
    of_model=True,
)
def healed_gap(lab: Lab, model: str | None) -> Measured:
    """What stays lost when so many blocks go, beside the curve over all numbers of blocks."""
    recipes = tuple(dict.fromkeys(run.recipe for run in lab.study.heal_runs))
    chosen = best(healed(lab, model, recipes), "any recipe")
    losses, weights = _dense(lab)
    name = model or lab.study.heal_runs[0].models[0]
    result = chosen.results[0]
    whole = resampled_losses(losses, weights, lab.study.seed)[:, 0]
    return Measured(
        value=chosen.loss - float(losses.to_numpy()[0] @ weights / weights.sum()),
        resampled=chosen.draws(lab.study.seed) - whole,
        n=len(weights),
        note=f"{len(result['drop'])} of {lab.num_blocks} blocks removed, {chosen.name}, "
        f"{result['tokens']} tokens; {_curve(lab, name, recipes)}",
        evidence=[*(f"{step}/sequences.parquet" for step in chosen.steps), "damage/sequences.parquet"],
    )


@statistic(
    "HYP-HALF",
    "healed_accuracy_gap",
    "mean accuracy of the unpruned model minus that of a pruned model after healing, on the same documents",
    of_model=True,
)
def accuracy_gap(lab: Lab, model: str | None) -> Measured:
    """What healing leaves lost of the accuracy, document by document.

    Of several healed models of the pruned one, that with the lowest validation loss decides.
    """
    asked = lab.study.tasks.models if lab.study.tasks else ()
    steps = {}
    for name in asked:
        pruned, run = lab.study.origin(name)
        if run is not None and (model is None or pruned == model):
            steps[name] = f"evaluate-heal-{healed_name(str(pruned), run)}"
    if DENSE not in asked or not steps:
        raise MissingData("needs tasks for the unpruned model and for a healed one")
    whole = read_results(lab.path(f"evaluate-{DENSE}", ""))
    told = {"groups": groups_of(whole), "seed": lab.study.seed}
    found = {
        name: mean_difference(
            pd.read_parquet(lab.path(step, "documents.parquet")), whole["documents"], **told
        )
        for name, step in steps.items()
    }
    name = min(found, key=lambda each: lab.result(f"heal-{each}")["validation_after"])
    value, draws, count = found[name]
    listed = ", ".join(f"{each} {gap:+.3f}" for each, (gap, _, _) in found.items())
    return Measured(
        value=value,
        resampled=draws,
        n=count,
        note=f"lost accuracy: {listed}; decided by {name}",
        evidence=[f"evaluate-{DENSE}/documents.parquet", f"{steps[name]}/documents.parquet"],
    )


@statistic(
    "HYP-REASONING",
    "excess_rise",
    "rise of the bits a byte of known answers, as a logarithm, of reasoning minus that of knowledge",
    of_model=True,
)
def reasoning_excess(lab: Lab, model: str | None) -> Measured:
    """Whether worked solutions suffer more than facts: means over tasks, documents resampled within each."""
    asked = lab.study.answers
    name = model or next((m for m in (asked.models if asked else ()) if m != DENSE), None)
    if asked is None or not {KNOWLEDGE, REASONING} <= set(asked.groups) or DENSE not in asked.models:
        raise MissingData("needs answers in the groups knowledge and reasoning, of the unpruned model too")
    if name not in asked.models:
        raise MissingData(f"needs the answers of {name}")
    pruned, run = lab.study.origin(str(name))
    steps = [f"answer-{DENSE}", f"answer-heal-{name}" if run else f"answer-prune-{pruned}"]
    before, after = (pd.read_parquet(lab.path(step, "documents.parquet")) for step in steps)
    rises, draws, notes = {}, {}, []
    for group in (KNOWLEDGE, REASONING):
        parts = [_rise(before, after, task, lab.study.seed) for task in asked.groups[group]]
        rises[group] = float(np.mean([value for value, _, _ in parts]))
        draws[group] = np.mean([drawn for _, drawn, _ in parts], axis=0)
        notes += [note for *_, note in parts]
    return Measured(
        value=rises[REASONING] - rises[KNOWLEDGE],
        resampled=draws[REASONING] - draws[KNOWLEDGE],
        n=min(before["task"].value_counts()),
        note="bits a byte before and after: " + ", ".join(notes) + _written(lab, str(name)),
        evidence=[f"{step}/documents.parquet" for step in steps],
    )


def _rise(before: pd.DataFrame, after: pd.DataFrame, task: str, seed: int) -> tuple[float, np.ndarray, str]:
    """Log of the ratio of bits a byte over a task's answers, its resamples, and both in words."""
    parts: list[Any] = [frame[frame["task"] == task] for frame in (before, after)]
    parts = [part.sort_values("document") for part in parts]
    bits = np.stack([part["bits"].to_numpy(np.float64) for part in parts])
    sizes = parts[0]["bytes"].to_numpy(np.float64)
    picks = resample_indices(len(sizes), seed=seed)
    drawn = bits[:, picks].sum(axis=2)  # the bytes are the same on both sides and cancel
    old, new = bits.sum(axis=1) / sizes.sum()
    return float(np.log(new / old)), np.log(drawn[1] / drawn[0]), f"{task} {old:.3f} and {new:.3f}"


def _written(lab: Lab, name: str) -> str:
    """What the same model writes beside the unpruned one, where the study has it."""
    writing = lab.study.writing
    if writing is None or name not in writing.models:
        return ""
    pruned, run = lab.study.origin(name)
    step = f"write-heal-{name}" if run else f"write-prune-{pruned}"
    table = pd.read_parquet(lab.path(step, "summary.parquet")).set_index("measure")["value"]
    return (
        f"; of {writing.new_tokens} tokens that it writes, {table['agreed']:.1f} agree with the unpruned "
        f"model's from the start, similarity {table['similarity']:.2f}, repeated 4-grams "
        f"{table['repeated_4']:.2f} against {table['repeated_4_reference']:.2f}"
    )


def _dense(lab: Lab) -> tuple[pd.DataFrame, np.ndarray]:
    """The unpruned model's losses ``[1, sequence]`` on the evaluation tokens, and the numbers of targets."""
    table: Any = pd.read_parquet(lab.path("damage", "sequences.parquet"))
    table = table[table["layer"] == DENSE_ROW].sort_values("sequence")
    losses = pd.DataFrame([table["loss"].to_numpy(np.float64)], index=[DENSE])
    return losses, table["tokens"].to_numpy(np.float64)


def _curve(lab: Lab, model: str, recipes: tuple[str, ...]) -> str:
    """Loss by number of removed blocks under the same criterion and protection, raw and healed."""
    own, parts = lab.study.cut(model), []
    for cut in lab.study.prune.cuts:
        if (cut.metric, cut.protect) != (own.metric, own.protect):
            continue
        raw, weights = loss_table(lab, {cut.name: f"prune-{cut.name}"})
        told = f"{cut.drop:g}: {float(raw.to_numpy()[0] @ weights / weights.sum()):.2f}"
        if groups := healed(lab, cut.name, recipes):
            told += f" to {best(groups, 'any recipe').loss:.2f}"
        parts.append(told)
    losses, weights = _dense(lab)
    dense = float(losses.to_numpy()[0] @ weights / weights.sum())
    return f"loss by blocks removed, raw to healed: 0: {dense:.2f}, " + ", ".join(parts)
