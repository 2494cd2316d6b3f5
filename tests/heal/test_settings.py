from __future__ import annotations

import math

import pytest

from preln.base.errors import InputError
from preln.heal import TrainingSettings, get_recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": None},
        {"epochs": 1},
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": "fast"},
        {"warmup_steps": -1},
        {"warmup_steps": 11},
        {"schedule": "step"},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0},
        {"seed": -1},
        {"eval_every": 0},
        {"checkpoint_every": 0},
        {"gradient_accumulation": 3},
        {"select": "middle"},
        {"optimizer": "sgd"},
        {"gradient_checkpointing": 1},
        {"precision": "float8"},
        {"early_stop": 0},
        {"early_stop": 2},
    ],
)
def test_bad_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainingSettings(**{"steps": 10, "batch_size": 8, **wrong})


def test_replaced_swaps_steps_and_epochs_and_knows_its_fields() -> None:
    base = TrainingSettings(epochs=2)
    assert base.replaced(steps=5).epochs is None
    assert base.replaced(learning_rate=None) == base
    with pytest.raises(InputError, match="lerning_rate: not a training setting"):
        base.replaced(lerning_rate=1.0)


def test_epochs_become_steps_and_batches_fit_the_rows() -> None:
    assert TrainingSettings(epochs=2, batch_size=4).resolved(10).steps == 5
    small = TrainingSettings(epochs=3, batch_size=64, gradient_accumulation=4).resolved(6)
    assert (small.steps, small.batch_size, small.gradient_accumulation) == (3, 6, 3)
    with pytest.raises(InputError, match="warmup_steps=100"):
        get_recipe("reassess-lora").settings.resolved(64)


def test_short_runs_keep_a_short_warm_up_unless_told() -> None:
    lora = get_recipe("lora")
    assert lora.settings_for(steps=2).warmup_steps == 0
    assert lora.settings_for(steps=2, warmup_steps=2).warmup_steps == 2
    assert lora.settings_for(steps=1000).warmup_steps == lora.settings.warmup_steps
    with pytest.raises(InputError, match="steps=0"):
        lora.settings_for(steps=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    plan = TrainingSettings(steps=12, warmup_steps=4, learning_rate=1.0, schedule=schedule)
    rates = [plan.rate(step) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    rest = rates[4:]
    assert rest == sorted(rest, reverse=True)
    expected = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[schedule]  # half-way through the decay
    assert rates[8] == pytest.approx(expected)
    assert min(rates) > 0
