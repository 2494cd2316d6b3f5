from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import preln.base.checkpoints as checkpoint_module
from preln.base.errors import InputError
from preln.heal import train
from preln.models import tiny_model

from . import helpers
from .helpers import random_tokens, run, settings

pytestmark = pytest.mark.integration


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread():
    """As in the process that is killed: sums split over threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stopped_run(recipe: str, directory: Path, at: int, **overrides: object) -> None:
    def stop(row: dict[str, object]) -> None:
        if row["split"] == "train" and row["step"] == at:
            raise Stopped

    with pytest.raises(Stopped):
        train(
            tiny_model("llama"), random_tokens(), validation=random_tokens(seed=1), recipe=recipe,
            settings=settings(eval_every=3, **overrides), directory=directory, on_row=stop,
        )  # fmt: skip


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("recipe", ["partial-1", "lora"])
@pytest.mark.parametrize("select", ["last", "best"])
def test_a_stopped_run_continues_to_the_same_bits(tmp_path: Path, recipe: str, select: str) -> None:
    undisturbed = run(recipe, None, select=select)
    stopped_run(recipe, tmp_path / "c", at=5, select=select)
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["step-00000004"]
    torch.manual_seed(1234)  # the continued process has drawn other random numbers
    continued = run(recipe, tmp_path / "c", select=select)
    assert equal(continued.trained, undisturbed.trained)
    assert equal(continued.model.state_dict(), undisturbed.model.state_dict())
    timeless = [c for c in undisturbed.history.columns if c != "seconds"]
    assert continued.history[timeless].equals(undisturbed.history[timeless])
    for key in ("tokens", "supervised_tokens", "loss_before", "loss_after", "best_step", "selected_step"):
        assert continued.manifest[key] == undisturbed.manifest[key]


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optimizer's moments the continued run must differ: the bits compared do depend on them."""
    undisturbed = run("partial-1", None)
    stopped_run("partial-1", tmp_path / "c", at=5)
    monkeypatch.setattr("preln.heal.training.loop.restore_optimizer", lambda *a: None)
    assert not equal(run("partial-1", tmp_path / "c").trained, undisturbed.trained)


def latest_step(directory: Path) -> int:
    return max((int(f.name[5:]) for f in directory.glob("step-*")), default=0)


@pytest.mark.parametrize("recipe", ["partial-1", "lora"])
def test_kill_9_and_the_same_command_continues(tmp_path: Path, recipe: str) -> None:
    overrides = {"steps": 12, "checkpoint_every": 1}
    out = tmp_path / "out.safetensors"
    command = [sys.executable, str(Path(helpers.__file__)), recipe, str(tmp_path / "c"), str(out)]
    command.append(json.dumps(overrides))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    slow = {**environment, "HEAL_TEST_PAUSE": "0.3"}
    first = subprocess.Popen(command, env=slow, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while latest_step(tmp_path / "c") < 3:
        assert first.poll() is None, first.stderr.read().decode()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    first.stderr.close()
    assert not out.exists()
    assert 3 <= latest_step(tmp_path / "c") < 12
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    assert equal(load_file(out), run(recipe, None, **overrides).trained)


def test_a_kill_while_staging_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run("partial-1", None)
    stopped_run("partial-1", tmp_path / "c", at=3)
    litter = tmp_path / "c" / ".step-00000004.abc.part"
    litter.mkdir()
    (litter / "trained.safetensors").write_bytes(b"half")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_json", fail)
        with pytest.raises(KeyboardInterrupt):
            run("partial-1", tmp_path / "c")
    assert (tmp_path / "c" / "step-00000002" / "state.json").is_file()
    assert equal(run("partial-1", tmp_path / "c").trained, undisturbed.trained)
    assert not litter.exists()


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_corrupted_checkpoint_is_named_and_refused(tmp_path: Path, name: str, how: str) -> None:
    stopped_run("head", tmp_path, at=5, select="best")
    file = tmp_path / "step-00000004" / name
    content = bytearray(file.read_bytes())
    if how == "flipped":
        place = content.index(b'"tokens": ') + 10 if name == "state.json" else len(content) - 2
        content[place] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(InputError, match=name) as refusal:
        run("head", tmp_path, select="best")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.002, now 0.001"),
        ({"steps": 8}, "steps was 6, now 8"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"recipe": "partial-2"}, "blocks was 1, now 2"),
        ({"tokens": random_tokens(seed=5)}, "train was"),
        ({"validation": None}, "validation was"),
        ({"model": tiny_model("llama", seed=1)}, "sha256 was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict, word: str) -> None:
    stopped_run("partial-1", tmp_path, at=5)
    own = {k: v for k, v in change.items() if k in ("recipe", "tokens", "validation", "model")}
    values = {"recipe": "partial-1", "model": tiny_model("llama"), "tokens": random_tokens(),
              "validation": random_tokens(seed=1), **own}  # fmt: skip
    plan = settings(eval_every=3, **{k: v for k, v in change.items() if k not in own})
    with pytest.raises(InputError, match="of another run") as refusal:
        train(**values, settings=plan, directory=tmp_path)
    assert word in str(refusal.value)
    assert (tmp_path / "step-00000004").is_dir()


def test_checkpoints_may_come_at_another_pace(tmp_path: Path) -> None:
    stopped_run("partial-1", tmp_path, at=5)
    assert equal(run("partial-1", tmp_path, checkpoint_every=1).trained, run("partial-1", None).trained)
