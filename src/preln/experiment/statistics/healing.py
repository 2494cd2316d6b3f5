"""What healing gives back, and what it costs: recipes against one another on one pruned model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from preln.experiment.sections import healed_name
from preln.experiment.statistics.damage import gap_to_best
from preln.experiment.statistics.decisions import Measured
from preln.experiment.statistics.healed import Healed, best, healed
from preln.experiment.statistics.registry import MissingData, statistic

if TYPE_CHECKING:
    from preln.experiment.lab import Lab

PARTIAL, LORA, QLORA = (
    ("partial-3", "reassess-partial-3"),
    ("lora", "reassess-lora"),
    ("qlora", "reassess-qlora"),
)
TAILS = [("head", "reassess-head"), *((f"partial-{k}", f"reassess-partial-{k}") for k in (1, 2, 3))]
MEMORY_MARGIN = 1.1  # how much more memory still counts as about the same


@statistic(
    "HYP-REVERSE-HEALED",
    "loss_gap_to_best",
    "loss of reverse order minus the best other metric's after healing all of them by one recipe, nats",
)
def reverse_healed(lab: Lab) -> Measured:
    """Reverse order against the best of the other metrics, after the run that healed most of them."""
    most: dict[str, str] = {}
    for run in lab.study.heal_runs:
        steps = {
            metric: f"heal-{healed_name(name, run)}"
            for metric, name in lab.study.prune.alike().items()
            if name in run.models
        }
        most = steps if len(steps) > len(most) else most
    return gap_to_best(lab, most, "reverse", [f"{step}/sequences.parquet" for step in most.values()])


@statistic(
    "HYP-PARTIAL",
    "loss_difference",
    "loss after partial-3 minus after LoRA, both at the published 1e-5, nats",
    of_model=True,
)
def partial_published(lab: Lab, model: str | None) -> Measured:
    """Partial-3 against LoRA at the published learning rate and equal tokens."""
    from preln.heal import get_recipe

    rate = get_recipe("reassess-lora").settings.learning_rate
    first, second = (
        best([g for g in healed(lab, model, names) if g.rate == rate], f"{names[0]} at {rate:g}")
        for names in (PARTIAL, LORA)
    )
    return _difference(lab, first, second)


@statistic(
    "HYP-PARTIAL-FAIR",
    "tuned_difference_tokens",
    "loss after partial-3 minus after LoRA at equal tokens, each at its best rate of the sweep, nats",
    of_model=True,
)
def partial_tuned(lab: Lab, model: str | None) -> Measured:
    """Partial-3 against LoRA, rates chosen on validation tokens, losses on others."""
    return _difference(lab, *_tuned(lab, model))


@statistic(
    "HYP-PARTIAL-FAIR",
    "tuned_difference_time",
    "validation loss after partial-3 minus LoRA's when it had run as long, each at its best rate, nats",
    of_model=True,
)
def partial_in_time(lab: Lab, model: str | None) -> Measured:
    """Partial-3 against LoRA at the end of the shorter of both runs; resampled over seeds alone."""
    first, _ = _tuned(lab, model)
    groups = healed(lab, model, LORA)
    ends = [float(np.mean(first.seconds())), *(float(np.mean(group.seconds())) for group in groups)]
    end = min(ends)
    second = min(groups, key=lambda group: group.validation_at(end).mean())
    values = first.validation_at(end) - second.validation_at(end)
    return Measured(
        value=float(values.mean()),
        resampled=_over_seeds(values, lab.study.seed),
        n=len(values),
        note=f"after {end:.0f} s: {_told(first, first.validation_at(end))}, "
        f"{_told(second, second.validation_at(end))}; whole runs take {ends[0]:.0f} s and "
        f"{second.seconds().mean():.0f} s",
        evidence=_evidence(first, second, file="training.parquet"),
    )


@statistic(
    "HYP-PARTIAL-FAIR",
    "larger_tuned_difference",
    "the larger of both differences, at equal tokens and at equal time, nats",
    of_model=True,
)
def partial_fair(lab: Lab, model: str | None) -> Measured:
    """The less favourable of the two comparisons, in every resample."""
    tokens, time = partial_tuned(lab, model), partial_in_time(lab, model)
    return Measured(
        value=max(tokens.value, time.value),
        resampled=np.maximum(tokens.resampled, time.resampled),
        n=min(tokens.n, time.n),
        note=f"equal tokens: {tokens.value:+.3f} ({tokens.note}); equal time: {time.value:+.3f} "
        f"({time.note})",
        evidence=[*tokens.evidence, *time.evidence],
    )


@statistic(
    "HYP-TAIL-ORDER",
    "largest_step",
    "largest change of the loss from head to +1, +2 and +3 blocks, each at its best rate, nats",
    of_model=True,
)
def tail_order(lab: Lab, model: str | None) -> Measured:
    """Whether every further trained block lowers the loss."""
    tails = [best(healed(lab, model, names), names[0]) for names in TAILS]
    losses = np.array([tail.loss for tail in tails])
    draws = np.stack([tail.draws(lab.study.seed) for tail in tails])
    return Measured(
        value=float(np.diff(losses).max()),
        resampled=np.diff(draws, axis=0).max(axis=0),
        n=tails[0].losses.shape[1],
        note=", ".join(_told(tail) for tail in tails),
        evidence=_evidence(*tails),
    )


@statistic(
    "HYP-QLORA",
    "loss_difference",
    "loss after QLoRA minus after LoRA at the same rate and tokens, nats",
    of_model=True,
)
def qlora_worse(lab: Lab, model: str | None) -> Measured:
    """QLoRA against LoRA, each seed against its own."""
    return _difference(lab, *_same_rate(lab, model))


@statistic(
    "HYP-QLORA",
    "worse_and_slower",
    "the smaller of QLoRA's excess loss over LoRA (nats) and the logarithm of its time over LoRA's",
    of_model=True,
)
def qlora_worse_and_slower(lab: Lab, model: str | None) -> Measured:
    """Both halves of the statement: the one that holds less."""
    first, second = _same_rate(lab, model)
    loss, time = _difference(lab, first, second), _log_ratio(lab, first, second)
    return Measured(
        value=min(loss.value, time.value),
        resampled=np.minimum(loss.resampled, time.resampled),
        n=loss.n,
        note=f"{loss.note}; {time.note}",
        evidence=[*loss.evidence, *time.evidence],
    )


@statistic(
    "HYP-HEAL-COST",
    "time_and_memory",
    "the larger of log(time of partial-3 over LoRA's) and log(its peak memory over 1.1 times LoRA's)",
    of_model=True,
)
def heal_cost(lab: Lab, model: str | None) -> Measured:
    """Whether partial-3 takes less time at about the same memory, as it runs here: from stored states."""
    first, second = _tuned(lab, model)
    time = _log_ratio(lab, first, second)
    ratio = first.memory() / second.memory()
    memory = float(np.log(ratio / MEMORY_MARGIN))
    return Measured(
        value=max(time.value, memory),
        resampled=np.maximum(time.resampled, memory),
        n=time.n,
        note=f"{time.note}; peak memory of the process {first.memory() / 2**30:.2f} and "
        f"{second.memory() / 2**30:.2f} GiB, ratio {ratio:.2f}",
        evidence=time.evidence,
    )


def _tuned(lab: Lab, model: str | None) -> tuple[Healed, Healed]:
    """Partial-3 and LoRA, each at the rate with the lowest validation loss, of two or more rates each."""
    groups = [healed(lab, model, names) for names in (PARTIAL, LORA)]
    if min(len(found) for found in groups) < 2:
        raise MissingData("needs partial-3 and lora on one pruned model, each at two rates or more")
    first, second = (best(found, "partial-3 and lora") for found in groups)
    return first, second


def _same_rate(lab: Lab, model: str | None) -> tuple[Healed, Healed]:
    """QLoRA at its best rate, and LoRA at the same rate."""
    quantised = best(healed(lab, model, QLORA), "qlora")
    return quantised, best(
        [g for g in healed(lab, model, LORA) if g.rate == quantised.rate], "lora at its rate"
    )


def _difference(lab: Lab, first: Healed, second: Healed) -> Measured:
    """Loss of one group minus another's, in pairs over sequences and seeds."""
    tokens = {result["tokens"] for group in (first, second) for result in group.results}
    if len(tokens) > 1:
        raise MissingData(f"needs equal tokens: {first.name} and {second.name} saw {sorted(tokens)}")
    result, seed = first.results[0], lab.study.seed
    drop = f"{result['metric']}-{len(result['drop'])}"
    return Measured(
        value=first.loss - second.loss,
        resampled=first.draws(seed) - second.draws(seed),
        n=first.losses.shape[1],
        note=f"{drop}, {result['tokens']} tokens, {_seeds(first)}; loss {result['loss_before']:.3f} before, "
        f"after: {_told(first)}, {_told(second)}",
        evidence=_evidence(first, second),
    )


def _log_ratio(lab: Lab, first: Healed, second: Healed) -> Measured:
    """Logarithm of one group's time over another's, seed by seed."""
    a, b = first.seconds(), second.seconds()
    if a.shape != b.shape:
        raise MissingData(f"needs equal seeds: {first.name} has {len(a)}, {second.name} {len(b)}")
    values = np.log(a / b)
    return Measured(
        value=float(values.mean()),
        resampled=_over_seeds(values, lab.study.seed),
        n=len(values),
        note=f"{first.name} takes {a.mean():.0f} s, {second.name} {b.mean():.0f} s",
        evidence=_evidence(first, second, file="training.parquet"),
    )


def _over_seeds(values: Any, seed: int) -> Any:
    from preln.base.stats import resample_indices

    return np.asarray(values)[resample_indices(len(values), seed=seed + 1)].mean(axis=1)


def _told(group: Healed, losses: Any = None) -> str:
    loss = group.loss if losses is None else float(np.mean(losses))
    return f"{group.results[0]['base_recipe']} {loss:.3f} at {group.rate:g}"


def _seeds(group: Healed) -> str:
    return f"{len(group.steps)} seed" + ("s" if len(group.steps) > 1 else "")


def _evidence(*groups: Healed, file: str = "sequences.parquet") -> list[str]:
    return [f"{step}/{file}" for step in itertools.chain.from_iterable(g.steps for g in groups)]
