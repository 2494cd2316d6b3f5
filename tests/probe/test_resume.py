"""A probe that was stopped goes on to the very numbers of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

import preln.probe.measure as measure_module
from preln.base.errors import InputError
from preln.models import tiny_model
from preln.probe import probe_tables
from preln.probe.block_spectra import JacobianProbe
from preln.probe.passes import Passes

pytestmark = pytest.mark.integration
MEASURES = ["stream", "updates", "gradients", "norms", "lens"]


def batch(n=6, t=7, seed=3):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


def frames(result):
    return {name: getattr(result, name) for name in ("layers", "pairs", "sequences", "resamples")}


def stop_after(monkeypatch, passes):
    """Make the probe die after some passes, with a checkpoint after every one."""
    monkeypatch.setattr(measure_module, "CHECKPOINT_SECONDS", -1.0)
    take = Passes.take

    def take_or_die(self, part):
        if self.done == passes:
            raise RuntimeError("killed")
        take(self, part)

    monkeypatch.setattr(Passes, "take", take_or_die)


@pytest.mark.parametrize("killed_at", [1, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_a_stopped_probe_goes_on_to_the_same_bits(architecture, killed_at, tmp_path, monkeypatch):
    model, ids = tiny_model(architecture, blocks=2), batch()
    whole = probe_tables(model, ids, measures=MEASURES, batch_size=1)
    with monkeypatch.context() as patch:
        stop_after(patch, killed_at)
        with pytest.raises(RuntimeError, match="killed"):
            probe_tables(model, ids, measures=MEASURES, batch_size=1, resume=tmp_path / "r")
    assert (tmp_path / "r").is_dir()
    taken = []
    with monkeypatch.context() as patch:
        take = Passes.take
        patch.setattr(Passes, "take", lambda self, part: (taken.append(self.done), take(self, part)))
        again = probe_tables(model, ids, measures=MEASURES, batch_size=1, resume=tmp_path / "r")
    assert taken == list(range(killed_at, 6))
    for name, frame in frames(whole).items():
        pd.testing.assert_frame_equal(frame, frames(again)[name], check_exact=True)
    assert again.manifest["loss"] == whole.manifest["loss"]


def test_jacobians_go_on_after_the_last_finished_sequence(tmp_path, monkeypatch):
    model, ids = tiny_model("llama", blocks=2), batch(3, 4)
    arguments = {"measures": ["residual_rms", "jacobians"], "jacobian_sequences": 3}
    whole = probe_tables(model, ids, **arguments)
    taken = []

    def batch_or_die(limit):
        plain = JacobianProbe.batch

        def run(self, tokens):
            if self.done == limit:
                raise RuntimeError("killed")
            taken.append(self.done)
            plain(self, tokens)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(JacobianProbe, "batch", batch_or_die(2))
        with pytest.raises(RuntimeError, match="killed"):
            probe_tables(model, ids, **arguments, resume=tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "take", lambda *_: pytest.fail("the passes were all made"))
        patch.setattr(JacobianProbe, "batch", batch_or_die(9))
        again = probe_tables(model, ids, **arguments, resume=tmp_path / "r")
    assert taken == [0, 1, 2]
    for name in ("layers", "sequences"):
        pd.testing.assert_frame_equal(frames(whole)[name], frames(again)[name], check_exact=True)
    with pytest.raises(InputError, match="jacobian_sequences"):
        probe_tables(model, ids, **(arguments | {"jacobian_sequences": 2}), resume=tmp_path / "r")


@pytest.mark.parametrize(
    ("changed", "culprit"),
    [
        ({"measures": ["stream"]}, "measures"),
        ({"seed": 5}, "seed"),
        ({"batch": batch(seed=4)}, "tokens"),
        ({"pairs": False}, "pairs"),
    ],
)
def test_checkpoints_of_another_probe_are_refused(changed, culprit, tmp_path, monkeypatch):
    model, arguments = tiny_model("llama", blocks=2), {"batch": batch(), "batch_size": 2}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(RuntimeError):
            probe_tables(model, **arguments, resume=tmp_path / "r")
    with pytest.raises(InputError, match=culprit):
        probe_tables(model, **(arguments | changed), resume=tmp_path / "r")
    other = tiny_model("llama", blocks=2, seed=1)
    with pytest.raises(InputError, match="model"):
        probe_tables(other, **arguments, resume=tmp_path / "r")


def test_the_command_goes_on_after_a_kill(tmp_path):
    """SIGKILL in the middle; the same command ends with the tables of an undisturbed one."""
    code = (
        "import sys, preln.probe.measure as m, preln.cli as c; m.CHECKPOINT_SECONDS = -1.0;"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "probe", "tiny:llama", "--sequences", "40", "--length", "16"]
    command += ["--batch-size", "1", "--out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(tmp_path / "a")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("a.resume/step-0000000[2-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    for name in ("a", "b"):
        subprocess.run(
            [*command, str(tmp_path / name)], env=environment, check=True, stdout=subprocess.DEVNULL
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    for table in ("layers", "pairs", "sequences", "resamples"):
        one, two = (pd.read_parquet(tmp_path / name / f"{table}.parquet") for name in ("a", "b"))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
