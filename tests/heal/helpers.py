"""Shared by the tests of healing, and run by itself as the process that gets killed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from preln.heal import HealResult, TrainingSettings, train
from preln.models import tiny_model


def random_tokens(n: int = 12, length: int = 16, seed: int = 0) -> Tensor:
    """A batch whose next token is predictable from the last: each row counts up from a random start."""
    start = torch.randint(0, 512, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(length)) % 512


def settings(**overrides: object) -> TrainingSettings:
    values = {"steps": 6, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 1, "checkpoint_every": 2}
    return TrainingSettings(**{**values, **overrides})


def run(recipe: str, directory: str | Path | None, **overrides: object) -> HealResult:
    return train(
        tiny_model("llama"),
        random_tokens(),
        validation=random_tokens(seed=1),
        recipe=recipe,
        settings=settings(eval_every=3, **overrides),
        directory=directory,
        on_row=_pause,
    )


def _pause(_: dict[str, object]) -> None:
    """Time to be killed in, where the test asks for it."""
    time.sleep(float(os.environ.get("HEAL_TEST_PAUSE", "0")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    from safetensors.torch import save_file

    recipe, directory, out, overrides = sys.argv[1:]
    save_file(run(recipe, directory, **json.loads(overrides)).trained, out)
