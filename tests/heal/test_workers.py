"""Two processes give the loss curve of one at the same global batch; full memory is worked around."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preln.base.errors import InputError
from preln.heal import train
from preln.heal.training.step import Stepper
from preln.models import tiny_model

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration
SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from preln.heal import Cache, train
from preln.models import tiny_model
from tests.heal.helpers import random_tokens, settings
plan = settings(steps=6, eval_every=3, gradient_accumulation=4)
result = train(tiny_model("llama"), random_tokens(), validation=random_tokens(6, seed=1),
               recipe=sys.argv[1], settings=plan, directory=sys.argv[2],
               cache=Cache(sys.argv[2] + ".prefix", mode=sys.argv[3]))
if os.environ.get("RANK", "0") == "0":
    print(json.dumps({"loss": result.history["loss"].tolist(), "split": result.history["split"].tolist(),
                      "processes": result.manifest["processes"],
                      "sum": sum(float(t.double().sum()) for t in result.trained.values())}))
"""


def launch(recipe: str, folder: Path, count: int, cache: str) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        env = dict(os.environ)
        if count > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-c", SCRIPT, recipe, str(folder), cache]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return json.loads(said[0].strip().splitlines()[-1])


@pytest.mark.parametrize(("recipe", "cache"), [("partial-1", "on"), ("lora", "off")])
def test_two_processes_give_the_loss_curve_of_one(recipe, cache, tmp_path):
    one, two = launch(recipe, tmp_path / "one", 1, "off"), launch(recipe, tmp_path / "two", 2, cache)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["split"] == two["split"]
    torch.testing.assert_close(torch.tensor(two["loss"]), torch.tensor(one["loss"]), rtol=1e-4, atol=1e-4)
    assert max(one["loss"]) - min(one["loss"]) > 0.01  # negative control: the curve moves
    assert two["sum"] == pytest.approx(one["sum"], rel=1e-3, abs=1e-2)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch):
    model, plan = tiny_model("llama"), settings(steps=2, batch_size=8)
    plain = train(model, random_tokens(), recipe="partial-1", settings=plan)
    backward = Stepper._gradients

    def tight(self, batch, rows, step):
        if self.portion > 2:
            raise torch.OutOfMemoryError("memory is full")
        return backward(self, batch, rows, step)

    monkeypatch.setattr(Stepper, "_gradients", tight)
    halved = train(model, random_tokens(), recipe="partial-1", settings=plan)
    assert halved.manifest["portion"] == 2 and plain.manifest["portion"] == 8
    losses = halved.history["loss"].tolist()
    assert losses == pytest.approx(plain.history["loss"].tolist(), rel=1e-5)


def test_memory_too_small_for_one_row_is_said(monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Stepper, "_gradients", full)
    with pytest.raises(InputError, match="does not hold one row of 16 tokens"):
        train(tiny_model("llama"), random_tokens(), recipe="head", settings=settings())


def test_another_runtime_error_is_not_taken_for_it(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Stepper, "_gradients", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(tiny_model("llama"), random_tokens(), recipe="head", settings=settings())


def test_float16_is_refused_and_bfloat16_trains():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="use bfloat16"):
        train(model, random_tokens(), recipe="head", settings=settings(precision="float16"))
    plain = train(model, random_tokens(), recipe="partial-1", settings=settings(steps=3))
    mixed = train(
        model, random_tokens(), recipe="partial-1", settings=settings(steps=3, precision="bfloat16")
    )
    gap = abs(mixed.history["loss"] - plain.history["loss"]).max()
    assert 0 < gap < 0.05
    assert all(t.dtype == torch.float32 for t in mixed.trained.values())


def test_early_stop_ends_a_run_that_learns_nothing():
    plan = settings(steps=40, eval_every=2, learning_rate=1e-12, early_stop=3, select="best")
    result = train(
        tiny_model("llama"), random_tokens(), validation=random_tokens(seed=1), recipe="head", settings=plan
    )
    assert result.manifest["steps"] < 40
    whole = train(
        tiny_model("llama"),
        random_tokens(24),
        validation=random_tokens(seed=1),
        recipe="partial-1",
        settings=settings(steps=12, eval_every=4, learning_rate=5e-3, early_stop=3),
    )
    assert whole.manifest["steps"] == 12
