"""What the probe costs: against a plain training step, and against hidden states and NumPy.

Run `python benchmarks/probe.py [--json]`. On SmolLM2 and on a tiny model, all in one process, the calls
interleaved, medians of their ratios:

- `step`: forward and backward pass of the same tokens without hooks, gradients of all parameters;
- `probe`: the groups stream, updates and gradients with angular distances and intervals, all of
  `preln.probe.probe_tables`; `anatomy` is the part of it that does not grow with the tokens;
- `forward`, `probe forward`: the same for the groups stream and updates, without gradients;
- `with norms`: the probe with the norms' exact sigma as well;
- `numpy`: what one would write today: `output_hidden_states=True`, gradients of hidden states by
  `retain_grad`, and the same quantities in NumPy afterwards.

Memory: the most that torch holds on the processor during a call, above what it held before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import interleaved, peak_bytes
from torch import Tensor

from preln import load_model, load_tokens
from preln.models import anatomy
from preln.models.residual import as_tokens, forward_losses
from preln.probe import probe_tables

GRADIENTS = ("stream", "updates", "gradients")
FORWARD = ("stream", "updates")


def step(model: Any, ids: Tensor, batch_size: int, *, backward: bool) -> None:
    """Run the plain passes over all tokens."""
    model.zero_grad(set_to_none=True)
    total = ids[:, 1:].numel()
    for rows in ids.split(batch_size):
        with torch.set_grad_enabled(backward):
            loss = forward_losses(model, as_tokens(rows)).sum() / total
        if backward:
            loss.backward()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of every token's two states."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def by_hand(model: Any, ids: Tensor, batch_size: int) -> dict[str, Any]:
    """Measure with hidden states and NumPy; states after the last block come out normalised."""
    model.zero_grad(set_to_none=True)
    kept: list[list[np.ndarray]] = []
    slopes: list[list[np.ndarray]] = []
    for rows in ids.split(batch_size):
        out = model(input_ids=rows, labels=rows, output_hidden_states=True, use_cache=False)
        for state in out.hidden_states:
            state.retain_grad()
        (out.loss * rows[:, 1:].numel() / ids[:, 1:].numel()).backward()
        kept.append([s.detach().numpy() for s in out.hidden_states])
        slopes.append([s.grad.numpy() for s in out.hidden_states])
    states = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    gradients = [np.concatenate(parts) for parts in zip(*slopes, strict=True)]
    found: dict[str, Any] = {
        "residual_rms": [np.sqrt((x**2).mean(-1)).mean() for x in states],
        "variance": [x.var(-1).mean() for x in states],
        "grad_hidden": [np.linalg.norm(g) for g in gradients],
        "massive": [((x**2).sum(-1).max(-1) / (x**2).sum((-1, -2))).mean() for x in states],
        "rank": [np.mean([entropy(row) for row in x]) for x in states],
    }
    pairs = list(zip(states, states[1:], gradients[1:], strict=False))
    found["cosine"] = [cosines(x, y).mean() for x, y, _ in pairs]
    found["update_ratio"] = [
        (np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)).mean() for x, y, _ in pairs
    ]
    found["update_cosine"] = [cosines(x, y - x).mean() for x, y, _ in pairs]
    found["damage"] = [-(g * (y - x)).sum() for x, y, g in pairs]
    found["angles"] = [
        np.arccos(np.clip(cosines(states[i], states[j]), -1, 1)).mean() / np.pi
        for i in range(len(states))
        for j in range(i + 1, len(states))
    ]
    found["grad_param"] = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    return found


def entropy(matrix: np.ndarray) -> float:
    """Return the effective rank of one sequence's states."""
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-30))).sum()))


def compare(name: str, *, sequences: int, length: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Time one model's calls, and measure the memory of two."""
    model, tokenizer = load_model(name)
    ids = load_tokens("docstrings", tokenizer, sequences=sequences, length=length, seed=0)
    short = ids[:batch_size]

    def probe(groups: tuple[str, ...], tokens: Tensor = ids) -> Callable[[], Any]:
        return lambda: probe_tables(model, tokens, measures=groups, batch_size=batch_size)

    calls = {
        "step": lambda: step(model, ids, batch_size, backward=True),
        "probe": probe(GRADIENTS),
        "anatomy": lambda: anatomy(model),
        "forward": lambda: step(model, ids, batch_size, backward=False),
        "probe forward": probe(FORWARD),
        "with norms": probe((*GRADIENTS, "norms")),
        "numpy": lambda: by_hand(model, ids, batch_size),
    }
    spent = interleaved(calls, repeats=repeats)
    ratio = {
        name: float(np.median(np.divide(spent[one], spent[other])))
        for name, one, other in (
            ("probe / step", "probe", "step"),
            ("anatomy / step", "anatomy", "step"),
            ("probe forward / forward", "probe forward", "forward"),
            ("with norms / step", "with norms", "step"),
            ("numpy / probe", "numpy", "probe"),
        )
    }
    # both hold gradients of everything they train, so these are counted for both
    memory = {
        "step": peak_bytes(lambda: step(model, short, batch_size, backward=True)),
        "probe": peak_bytes(probe(GRADIENTS, short)),
        "numpy": peak_bytes(lambda: by_hand(model, short, batch_size)),
    }
    model.zero_grad(set_to_none=True)
    return {
        "model": name,
        "tokens": ids.numel(),
        "batch": [batch_size, length],
        "seconds": {key: float(np.median(value)) for key, value in spent.items()},
        "ratio": ratio,
        "memory": memory,
        "memory ratio": memory["probe"] / memory["step"],
    }


def show(result: dict[str, Any]) -> str:
    """Lay one model's result out as text."""
    lines = [f"{result['model']}: {result['tokens']} tokens, batches of {result['batch']}"]
    lines += [f"  {name:26} {value:9.3f} s" for name, value in result["seconds"].items()]
    lines += [f"  {name:26} {value:9.2f} times" for name, value in result["ratio"].items()]
    lines += [
        f"  peak memory of {name:11} {value / 2**20:9.1f} MiB" for name, value in result["memory"].items()
    ]
    lines.append(f"  {'memory, probe / step':26} {result['memory ratio']:9.2f} times")
    return "\n".join(lines)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print plain data instead of text")
    parser.add_argument("--models", default="smollm2-135m,tiny:llama:8", help="comma-separated")
    parser.add_argument("--sequences", type=int, default=8, help="sequences (8)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence (128)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences in a pass (4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    options = parser.parse_args()
    results = [
        compare(
            name,
            sequences=options.sequences,
            length=options.length,
            batch_size=options.batch_size,
            repeats=options.repeats,
        )
        for name in options.models.split(",")
    ]
    print(json.dumps(results) if options.json else "\n\n".join(map(show, results)))


if __name__ == "__main__":
    main()
