"""Sigma of a norm's Jacobian from the secular equation against a dense decomposition and iterative solvers.

Run `python benchmarks/sigma.py [--json]`. For 1,000 vectors with a gain at d = 4096 it times
`rms_norm_sigma` and `layer_norm_sigma` on all of them, and on a few of them, scaled up to 1,000:

- `dense`: torch.linalg.svdvals of the Jacobian in float32, the faster precision, the Jacobian given;
- `svds`: scipy.sparse.linalg.svds for one singular value, given products with the Jacobian in O(d);
- `lanczos`: `preln.linops.largest_singular_value` on torch's own layer, backward and forward products.

All in one process, one after the other, with the same number of threads. Memory: the most that torch holds
during a call for one vector, at d and 4 d.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from timing import peak_bytes, seconds
from torch import Tensor

from preln import closed_form as cf
from preln.linops import jacobian_operator, largest_singular_value
from preln.testing import NormLayer

EPS = 1e-5


def products(layer: NormLayer, x: Tensor) -> LinearOperator:
    """Return G = diag(gamma) (C - (1 - t) u u^T)/s at x `[d]` by its products, in O(d)."""
    rows = x.double().numpy()
    gain = np.ones_like(rows) if layer.weight is None else layer.weight.double().numpy()
    centre = layer.kind == "layer_norm"
    centred = rows - rows.mean() if centre else rows
    s = np.sqrt(np.mean(centred**2) + layer.eps)
    factor = centred / (np.sqrt(len(rows)) * s)

    def plain(v: np.ndarray) -> np.ndarray:
        v = v.ravel()
        v = v - v.mean() if centre else v
        return (v - factor * (factor @ v)) / s

    return LinearOperator(
        (len(rows), len(rows)),
        matvec=lambda v: gain * plain(v),
        rmatvec=lambda v: plain(gain * v.ravel()),
        dtype=np.float64,
    )


def rivals(layer: NormLayer, x: Tensor) -> dict[str, Callable[[], float]]:
    """Return other ways to sigma at one vector `[d]`, each ready to call."""
    dense = layer.jacobian(x)
    operator = products(layer, x)
    return {
        "dense": lambda: float(torch.linalg.svdvals(dense)[0]),
        "svds": lambda: float(svds(operator, k=1, return_singular_vectors=False, rng=0)[0]),
        "lanczos": lambda: float(largest_singular_value(jacobian_operator(layer, x.double())).sigma),
    }


def compare(kind: str, *, d: int, vectors: int, sample: int, seed: int = 0) -> dict[str, Any]:
    """Time one layer's sigma on all vectors and its rivals on the first few.

    Args:
        kind: `rms_norm` or `layer_norm`.
        d: the dimension.
        vectors: how many vectors to report times for.
        sample: how many of them the rivals get.
        seed: of vectors and gain.

    Returns:
        `seconds` for all vectors by method, `ratio` of each rival's time to the closed form's, and
        `difference`, the rival's largest relative difference from it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(vectors, d, generator=generator)
    layer = NormLayer(kind, EPS, 1 + 0.5 * torch.randn(d, generator=generator))
    double = NormLayer(kind, EPS, None if layer.weight is None else layer.weight.double())
    sigma = layer.sigma(x)
    spent = {"closed form": seconds(lambda: layer.sigma(x), repeats=3)}
    difference: dict[str, float] = {}
    for row, value in zip(x[:sample], sigma[:sample].tolist(), strict=True):
        calls = rivals(layer, row) | {"lanczos": rivals(double, row)["lanczos"]}
        for name, call in calls.items():
            found: list[float] = []
            used = seconds(lambda call=call, found=found: found.append(call()), warm=False)
            spent[name] = spent.get(name, 0.0) + used * vectors / sample
            difference[name] = max(difference.get(name, 0.0), abs(found[0] / value - 1))
    ratio = {name: used / spent["closed form"] for name, used in spent.items() if name != "closed form"}
    return {"seconds": spent, "ratio": ratio, "difference": difference}


def memory(kind: str, *, d: int) -> dict[str, Any]:
    """Return the peak memory for one vector at d and 4 d, with and without gradients, and its growth."""
    result = {}
    for gradients in (False, True):
        peaks = {}
        for size in (d, 4 * d):
            x = torch.randn(1, size, generator=torch.Generator().manual_seed(1)).requires_grad_(gradients)
            weight = torch.linspace(0.5, 2.0, size).requires_grad_(gradients)
            sigma = cf.layer_norm_sigma if kind == "layer_norm" else cf.rms_norm_sigma

            def call(sigma: Any = sigma, x: Tensor = x, weight: Tensor = weight) -> None:
                value = sigma(x, weight).sum()
                if value.requires_grad:
                    torch.autograd.grad(value, (x, weight))

            peaks[size] = peak_bytes(call)
        name = "sigma and its gradients" if gradients else "sigma"
        result[name] = {
            "bytes": peaks,
            "growth": peaks[4 * d] / peaks[d],
            "float64_vectors": peaks[4 * d] / (4 * d * 8),
        }
    return result


def run(*, d: int, vectors: int, sample: int) -> dict[str, Any]:
    """Run everything; return plain data."""
    result: dict[str, Any] = {
        "d": d,
        "vectors": vectors,
        "sample": sample,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for kind in ("rms_norm", "layer_norm"):
        result[kind] = compare(kind, d=d, vectors=vectors, sample=sample) | {"memory": memory(kind, d=d)}
    return result


def show(result: dict[str, Any]) -> str:
    """Lay the result out as text."""
    lines = [f"{result['vectors']} vectors with gain, d = {result['d']}, {result['threads']} thread(s)"]
    lines.append(f"(rivals: {result['sample']} vectors measured, scaled)")
    for kind in ("rms_norm", "layer_norm"):
        part = result[kind]
        lines.append(f"\n{kind}")
        for name, used in part["seconds"].items():
            more = ""
            if name in part["ratio"]:
                more = f"  {part['ratio'][name]:9.0f} times  differs by {part['difference'][name]:.1e}"
            lines.append(f"  {name:12} {used:12.2f} s{more}")
        for name, peak in part["memory"].items():
            small, large = peak["bytes"].items()
            lines.append(
                f"  memory of {name}: {small[1]} bytes at d = {small[0]}, {large[1]} at d = {large[0]}: "
                f"{peak['growth']:.2f} times, {peak['float64_vectors']:.1f} vectors in float64"
            )
    return "\n".join(lines)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print plain data instead of text")
    parser.add_argument("--d", type=int, default=4096, help="dimension (4096)")
    parser.add_argument("--vectors", type=int, default=1000, help="number of vectors (1000)")
    parser.add_argument("--sample", type=int, default=2, help="vectors the rivals get (2)")
    options = parser.parse_args()
    result = run(d=options.d, vectors=options.vectors, sample=options.sample)
    print(json.dumps(result) if options.json else show(result))


if __name__ == "__main__":
    main()
