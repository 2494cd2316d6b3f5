"""The check of formulas on a GPU, put to the test on the CPU: it passes there, and notices wrong numbers."""

import pytest
import torch

from preln.testing.checks import device
from preln.testing.checks.norm import PROPERTIES
from preln.testing.layers import NormLayer
from preln.testing.verify import verify

IDS = sorted(PROPERTIES)


@pytest.mark.parametrize("id", IDS)
def test_right_formulas_pass_and_say_where_they_were_computed(id):
    found = device.on_device(id, "cpu", "a CPU")
    assert found and all(e.passed and e.kind == "property" for e in found)
    assert all(e.detail["against"].endswith("; formulas on a CPU") and e.detail["n"] > 0 for e in found)


@pytest.mark.parametrize("id", IDS)
def test_a_device_that_computes_something_else_is_noticed(id, monkeypatch):
    """Negative control: numbers that come back three parts in a thousand too large."""
    honest = device.OnDevice._there
    monkeypatch.setattr(
        device.OnDevice, "_there", lambda layer, x: (honest(layer, x)[0], honest(layer, x)[1] / 1.003)
    )
    assert not all(e.passed for e in device.on_device(id, "cpu", "a CPU"))


def test_formulas_run_on_the_device_and_come_back(monkeypatch):
    seen = []
    monkeypatch.setattr(NormLayer, "sigma", lambda layer, x: seen.append(x.device.type) or x[..., 0])
    layer = device.OnDevice("rms_norm", 1e-6, torch.ones(2), device="meta")
    with pytest.raises(NotImplementedError):  # nothing can be copied back from where there are no numbers
        layer.sigma(torch.ones(3, 2))
    assert seen == ["meta"]


def test_other_claims_have_no_such_check():
    assert device.on_device("STK-INIT", "cpu", "a CPU") == []


def test_without_a_gpu_verify_says_that_the_check_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(device, "gpu", lambda: None)
    assert verify(["RMS-JAC"]).ok
    assert capsys.readouterr().err.splitlines() == [
        "no GPU here: the check of the norms' formulas on a GPU is skipped"
    ]
    assert verify(["STK-GRADIENT-MONOTONE"]).ok
    assert capsys.readouterr().err == ""


def test_with_a_gpu_its_evidence_is_in_the_ledger(monkeypatch, capsys):
    honest = device.on_device
    monkeypatch.setattr(device, "gpu", lambda: "a GPU")
    monkeypatch.setattr(device, "on_device", lambda id, _, name: honest(id, "cpu", name))
    evidence = verify(["RMS-JAC"]).claims["RMS-JAC"].evidence
    assert sum("formulas on a GPU" in e.detail.get("against", "") for e in evidence) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("id", IDS)
def test_the_formulas_hold_on_the_gpu_that_is_here(id):
    assert all(e.passed for e in device.on_device(id, "cuda", str(device.gpu())))
