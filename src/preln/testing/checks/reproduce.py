"""Every counterexample of the ledger again, in torch and float64, against its exact values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma
from preln.testing.properties import Worst
from preln.theory import Evidence

Instance = Mapping[str, Any]


def number(exact: Any) -> float:
    """Return an exact value of the ledger as a float: a whole number or a fraction such as '9/16'."""
    return float(Fraction(str(exact)))


def tensor(values: Any) -> Tensor:
    """Return nested exact values as a float64 tensor."""
    if isinstance(values, list):
        return torch.stack([tensor(v) for v in values])
    return torch.tensor(number(values), dtype=torch.float64)


def _norm_jacobian(instance: Instance, layer: str | None = None) -> Tensor:
    weight = tensor(instance["weight"]) if "weight" in instance else None
    norm = NormLayer(layer or instance["layer"], number(instance["eps"]), weight)
    return autograd_jacobian(norm, tensor(instance["x"])[None])[0]


def _sigma(instance: Instance) -> dict[str, Tensor]:
    return {"sigma": dense_sigma(_norm_jacobian(instance))}


def _two_sigmas(instance: Instance) -> dict[str, Tensor]:
    names = ("sigma_rms", "sigma_ln")
    layers = zip(names, instance["layers"], strict=True)
    return {name: dense_sigma(_norm_jacobian(instance, layer)) for name, layer in layers}


def _block(instance: Instance) -> Tensor:
    norm = _norm_jacobian(instance)
    return torch.eye(len(norm), dtype=norm.dtype) + tensor(instance["branch"]) @ norm


def _gradients(instance: Instance) -> dict[str, Tensor]:
    upstream = tensor(instance["upstream"])
    pulled = _block(instance).T @ upstream
    return {"gradient_norm_before": pulled.norm(), "gradient_norm_after": upstream.norm()}


def _smallest(instance: Instance) -> dict[str, Tensor]:
    block = torch.linalg.matrix_power(_block(instance), instance["blocks"])
    size = dense_sigma(tensor(instance["branch"])) * dense_sigma(_norm_jacobian(instance))
    return {"smallest": torch.linalg.svdvals(block)[-1], "claimed": (1 - size) ** instance["blocks"]}


def _dropped(instance: Instance) -> dict[str, Tensor]:
    def run(skip: list[int]) -> tuple[Tensor, Tensor]:
        state, updates = tensor(instance["x"]), []
        for k, weight in enumerate(instance["weights"]):
            updates.append(number(weight) * state)
            state = state if k in skip else state + updates[-1]
        return state, torch.stack(updates)

    whole, updates = run([])
    cut, _ = run(instance["dropped"])
    claimed = whole - updates[instance["dropped"]].sum(0)
    return {"whole": whole.squeeze(), "cut": cut.squeeze(), "claimed": claimed.squeeze()}


def _windows(instance: Instance) -> dict[str, Tensor]:
    # States of one, two entries: one list is one state.
    states = [tensor(s) for s in instance["states"]]

    def angular(a: Tensor, b: Tensor) -> Tensor:
        a, b = a / a.norm(), b / b.norm()
        return 2 * torch.atan2((a - b).norm(), (a + b).norm()) / torch.pi

    size = instance["size"]
    starts = range(len(states) - size)
    sums = [sum(angular(states[s + k], states[s + k + 1]) for k in range(size)) for s in starts]
    across = [angular(states[s], states[s + size]) for s in starts]
    by_sum, by_across = torch.stack([torch.as_tensor(s) for s in sums]), torch.stack(across)
    picked = {"by_sum": by_sum.argmin().double(), "by_across": by_across.argmin().double()}
    return {"sums": by_sum, "across": by_across} | picked


REPRODUCE: dict[str, Callable[[Instance], dict[str, Tensor]]] = {
    "RMS-PAPER-MODELS": _sigma,
    "LN-NORM": _sigma,
    "CMP-LT1-GAIN": _sigma,
    "CMP-SAME-LOWD": _two_sigmas,
    "CMP-PAPER": _two_sigmas,
    "STK-GRADIENT-MONOTONE": _gradients,
    "STK-LOWER-RAW": _smallest,
    "PRN-TELESCOPE-ANY": _dropped,
    "SIM-SUM": _windows,
}
"""Claim -> (instance -> the quantities that the ledger gives exact values of)."""


def reproduce(id: str, detail: Mapping[str, Any]) -> Evidence:
    """Evaluate a counterexample's instance in torch and compare with the ledger's exact values.

    Args:
        id: a claim of `REPRODUCE`.
        detail: the counterexample's detail, with `instance` and `values`.
    """
    worst = Worst(f"torch in float64 against the exact values of {id}'s counterexample")
    found = REPRODUCE[id](detail["instance"])
    for name, value in found.items():
        exact = tensor(detail["values"][name])
        errors = (value - exact).abs().reshape(-1) / exact.abs().reshape(-1).clamp(min=1.0)
        worst.update(errors, torch.zeros(len(errors), 1), quantity=name, instance=dict(detail["instance"]))
    return worst.evidence()
