"""The benchmark of sigma runs, its methods agree, and memory is linear in d. Nothing here asserts a time."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def sigma(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_sigma", FOLDER / "sigma.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("timing", None)


def test_small_run(sigma):
    result = sigma.run(d=64, vectors=6, sample=2)
    for kind in ("rms_norm", "layer_norm"):
        part = result[kind]
        assert set(part["ratio"]) == {"dense", "svds", "lanczos"} and min(part["seconds"].values()) > 0
        assert max(part["difference"].values()) < 1e-5
    json.dumps(result)
    assert "lanczos" in sigma.show(result)


def test_memory_is_linear_in_the_dimension(sigma):
    for kind in ("rms_norm", "layer_norm"):
        peaks = sigma.memory(kind, d=4096)
        for peak in peaks.values():
            assert 3.5 < peak["growth"] < 4.5 and peak["float64_vectors"] < 64
        assert peaks["sigma"]["float64_vectors"] <= peaks["sigma and its gradients"]["float64_vectors"]


def test_the_memory_measurement_sees_a_square_matrix(sigma):
    """Negative control."""
    small, large = (sigma.peak_bytes(lambda n=n: torch.ones(n, n).sum()) for n in (256, 1024))
    assert small >= 4 * 256**2 and 15 < large / small < 17
