"""What a spectral norm of a block's Jacobian costs: by product, by iteration, and against dense ways.

Run `python benchmarks/jacobians.py [--model smollm2-135m] [--block 5] [--length 128] [--batch 2] [--json]`.

- `pair`: one product with J and one with its transpose, over one forward and one backward pass (gradient of
  the block's input only) of the same block: the model's own attention, and the mathematical attention that
  a second derivative needs. `lanczos` is the whole iteration's time by pair over that of its products.
- `iterations`: product pairs of Lanczos from its random start, and of power iteration on J^T J from the same
  vector, until each is within 1e-3 and 1e-6 of a value converged to 1e-7.
- `norm`: exact sigma of the block's first norm from the secular equation, on all tokens, against
  `torch.autograd.functional.jacobian` and `torch.linalg.svdvals` on a few tokens, scaled to all.

The two sides of every ratio are timed in turns, and ratios are medians over the rounds; one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from timing import interleaved
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import preln
from preln.linops import LinearOperator, jacobian_operator, largest_singular_value
from preln.models import anatomy, replay
from preln.models.maps import block_map, capture_calls, hidden_input
from preln.models.placement import Call
from preln.models.residual import as_tokens, undisturbed
from preln.probe import recognise

MOST = 400


def medians(spent: dict[str, list[float]]) -> dict[str, float]:
    """Return the median time of every call."""
    return {name: statistics.median(times) for name, times in spent.items()}


def ratio(over: list[float], under: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def pair_cost(block: nn.Module, call: Call, operator: LinearOperator, *, rounds: int) -> dict[str, Any]:
    """Time products against passes through the block."""
    x = hidden_input(call)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def passes() -> None:
        point = x.clone().requires_grad_(True)
        torch.autograd.grad(replay(block, call, point), point, v)

    def mathematical() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            passes()

    fixed = 12
    spent = interleaved(
        {
            "forward and backward": passes,
            "the same, mathematical attention": mathematical,
            "J v": lambda: operator.matvec(v),
            "J^T u": lambda: operator.rmatvec(v),
            "lanczos": lambda: largest_singular_value(operator, rtol=0.0, max_products=fixed),
        },
        repeats=rounds,
    )
    pair = [a + b for a, b in zip(spent["J v"], spent["J^T u"], strict=True)]
    both, exact = spent["forward and backward"], spent["the same, mathematical attention"]
    return {
        "seconds": medians(spent),
        "pair over forward and backward": ratio(pair, both),
        "pair over the same, mathematical attention": ratio(pair, exact),
        "lanczos over its products": ratio(spent["lanczos"], pair) / fixed,
        "lanczos by pair over forward and backward": ratio(spent["lanczos"], both) / fixed,
    }


def power_iteration(operator: LinearOperator, target: Tensor, rtol: float) -> int:
    """Return the pairs until power iteration is within ``rtol`` of the target for every map, or MOST."""
    shape, b = operator.in_shape, operator.batch_size
    v = torch.randn(operator.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = v.to(operator.dtype).expand(b, -1)
    for k in range(1, MOST + 1):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        u = operator.matvec(v.reshape(shape))
        sigma = torch.linalg.vector_norm(u.flatten(1), dim=1)
        if bool(((sigma / target - 1).abs() <= rtol).all()):
            return k
        v = operator.rmatvec(u).flatten(1)
    return MOST


def lanczos_pairs(operator: LinearOperator, target: Tensor, rtol: float) -> int:
    """Return the least number of pairs after which Lanczos is within ``rtol`` of the target."""
    for k in range(1, MOST + 1):
        found = largest_singular_value(operator, rtol=0.0, max_products=k)
        if bool(((found.sigma / target - 1).abs() <= rtol).all()):
            return k
    return MOST


def iterations(operator: LinearOperator) -> dict[str, Any]:
    """Count product pairs to the same accuracy."""
    target = largest_singular_value(operator, rtol=1e-7 if operator.dtype == torch.float64 else 1e-6,
                                    max_products=MOST)  # fmt: skip
    stopped = largest_singular_value(operator)
    result: dict[str, Any] = {
        "sigma": target.sigma.tolist(),
        "stopped at a residual of 1e-3": {
            "pairs": stopped.steps.tolist(),
            "error": (stopped.sigma / target.sigma - 1).abs().max().item(),
        },
    }
    for rtol in (1e-3, 1e-6):
        lanczos = lanczos_pairs(operator, target.sigma, rtol)
        power = power_iteration(operator, target.sigma, rtol)
        result[f"{rtol:.0e}"] = {"lanczos": lanczos, "power": power, "power gave up": power == MOST}
    return result


def norm_cost(norm: nn.Module, h: Tensor, *, few: int, rounds: int) -> dict[str, Any]:
    """Time the exact sigma of a norm on all tokens against dense Jacobians of a few, scaled."""
    law, rows = recognise(norm, h.shape[-1]), h.flatten(0, -2)

    def dense() -> Tensor:
        return torch.stack([
            torch.linalg.svdvals(torch.autograd.functional.jacobian(norm, row, vectorize=True))[0]
            for row in rows[:few]
        ])  # fmt: skip

    spent = interleaved({"exact": lambda: law.sigma(rows), "dense": dense}, repeats=rounds)
    scale = len(rows) / few
    return {
        "tokens": len(rows),
        "exact seconds": medians(spent)["exact"],
        "dense seconds, scaled": scale * medians(spent)["dense"],
        "ratio": scale * ratio(spent["dense"], spent["exact"]),
        "difference": (dense() / law.sigma(rows[:few]) - 1).abs().max().item(),
    }


def run(name: str, *, block: int, length: int, batch: int, rounds: int) -> dict[str, Any]:
    """Run everything on one block of one model; return plain data."""
    model, tokenizer = preln.load_model(name)
    torch.set_num_threads(1)  # importing the model library may raise it
    ids = torch.randint(1, len(tokenizer), (batch, length), generator=torch.Generator().manual_seed(0))
    with undisturbed(model):
        found = anatomy(model)
        call = capture_calls(model, found, as_tokens(ids))[block]
        module, norm = found.blocks[block], found.parts(block).attention_norm
        operator = jacobian_operator(block_map(module, call), hidden_input(call), batch=1)
        result = {
            "model": name,
            "block": block,
            "shape": list(operator.in_shape),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "pair": pair_cost(module, call, operator, rounds=rounds),
            "iterations": iterations(operator),
        }
        if norm is not None:
            result["norm"] = norm_cost(norm, hidden_input(call), few=4, rounds=max(3, rounds // 3))
    return result


def show(result: dict[str, Any]) -> str:
    """Lay the result out as text."""
    shape = "x".join(map(str, result["shape"]))
    lines = [f"{result['model']}, block {result['block']}, {shape}, {result['threads']} thread"]
    pair = result["pair"]
    lines += [f"  {name:36} {1e3 * used:10.2f} ms" for name, used in pair["seconds"].items()]
    lines += [f"  {name:44} {value:.3f}" for name, value in pair.items() if name != "seconds"]
    for name, value in result["iterations"].items():
        lines.append(f"  {name}: {value}")
    if "norm" in result:
        part = result["norm"]
        lines.append(
            f"  sigma of the norm on {part['tokens']} tokens: {part['exact seconds']:.3f} s, dense "
            f"{part['dense seconds, scaled']:.1f} s: {part['ratio']:.0f} times, "
            f"differs by {part['difference']:.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print plain data instead of text")
    parser.add_argument("--model", action="append", help="model, repeatable (smollm2-135m, tiny:llama)")
    parser.add_argument("--block", type=int, default=5, help="block of the first model (5); 1 of the others")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (128)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (2)")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (11)")
    options = parser.parse_args()
    names = options.model or ["smollm2-135m", "tiny:llama"]
    results = [
        run(name, block=1 if index else options.block, length=options.length, batch=options.batch,
            rounds=options.rounds)
        for index, name in enumerate(names)
    ]  # fmt: skip
    print(json.dumps(results) if options.json else "\n\n".join(map(show, results)))


if __name__ == "__main__":
    main()
