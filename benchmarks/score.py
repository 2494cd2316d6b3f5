"""What scoring costs: against counted operations, against the passes it shares, and against the plain way.

Run `python benchmarks/score.py [--json]`. On SmolLM2 and on a deep tiny model, in one process, the calls
interleaved, medians of the rounds' ratios:

- `leave-one-out / count`: all blocks left out in turn, against the measured time of a pass through the blocks
  and of a head (final norm, logits, losses), times their numbers: L(L + 1)/2 blocks and L + 1 heads;
- `all / shared`: every criterion of `preln.score(..., "all")` together, against one plain forward and
  backward pass (gradients of the blocks' weights) plus leave-one-out;
- `sweep / count`: the loss at every reverse depth, against one forward pass and L heads;
- `sleb / count`: greedy removal of two blocks, against the block and head passes it needs;
- `plain / …`: a new model by `drop_blocks` and a forward pass for every question. Three such questions of
  each kind are timed and the mean is multiplied by their number; on models of up to 16 blocks all are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, seconds
from torch import Tensor, nn

from preln import load_model, load_tokens
from preln.models import anatomy, drop_blocks, losses_from_logits, token_losses
from preln.models.residual import as_tokens, forward_losses, undisturbed
from preln.prune import depth_sweep, leave_one_out, score
from preln.prune.walk import walk

SIZE = 2


class Plain:
    """Passes written out, without any of the code that is measured."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids, self.found = model, ids, anatomy(model)
        self.tokens = as_tokens(ids)
        self.walk = walk(model, self.found.blocks, self.tokens)
        self.norm: nn.Module = self.found.final_norm or nn.Identity()

    @torch.no_grad()
    def blocks(self) -> Tensor:
        """Run all blocks once, with the masks and positions of an earlier pass."""
        return self.walk.through(self.walk.states[0], range(self.found.num_blocks))

    @torch.no_grad()
    def head(self) -> Tensor:
        """Run what follows the blocks once."""
        return losses_from_logits(self.found.head(self.norm(self.walk.states[-1])), self.ids)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Run the model once."""
        return forward_losses(self.model, self.tokens)

    def step(self) -> None:
        """Run it forward and backward, for the gradients of the blocks' weights."""
        weights = [p for block in self.found.blocks for p in block.parameters()]
        with undisturbed(self.model, weights):
            forward_losses(self.model, self.tokens).mean().backward()

    def without(self, sets: list[list[int]]) -> list[float]:
        """Make a model without some blocks and run it, for each of the sets."""
        return [float(token_losses(drop_blocks(self.model, gone), self.ids)[0].mean()) for gone in sets]

    def time(self, sets: list[list[int]]) -> float:
        """Return the seconds that this takes: of three sets, scaled up, where there are many."""
        sample = sets if self.found.num_blocks <= 16 else sets[:: max(1, len(sets) // 3)][:3]
        return seconds(lambda: self.without(sample), warm=False) * len(sets) / len(sample)

    def questions(self, gone: list[int]) -> dict[str, list[list[int]]]:
        """List what each method asks: sets of blocks to do without."""
        every = range(self.found.num_blocks)
        return {
            "leave-one-out": [[k] for k in every],
            "sweep": [list(every[k:]) for k in every[1:]],
            "sleb": [[*gone[:i], k] for i in range(len(gone)) for k in every if k not in gone[:i]],
        }


def sleb_counts(gone: list[int], count: int) -> tuple[int, int]:
    """Count the block and head passes of greedy removal that runs only what lies behind a change."""
    blocks, heads = count, 0
    for done in range(len(gone)):
        left = [k for k in range(count) if k not in gone[:done]]
        blocks += sum(sum(j > k for j in left) for k in left)
        heads += len(left)
        if done + 1 < len(gone):
            blocks += sum(j > gone[done] for j in left)
    return blocks, heads


def ratios(spent: dict[str, list[float]], top: str, bottom: Callable[[dict[str, float]], float]) -> float:
    """Return the median over rounds of one call's time over a combination of others'."""
    rounds = [dict(zip(spent, times, strict=True)) for times in zip(*spent.values(), strict=True)]
    return statistics.median(each[top] / bottom(each) for each in rounds)


def measure(model: Any, ids: Tensor, *, repeats: int) -> dict[str, Any]:
    """Return medians of times and ratios on one model."""
    plain, count = Plain(model, ids), anatomy(model).num_blocks
    n = len(ids)
    calls: dict[str, Callable[[], Any]] = {
        "blocks": plain.blocks,
        "head": plain.head,
        "forward": plain.forward,
        "step": plain.step,
        "leave-one-out": lambda: leave_one_out(model, ids, batch_size=n),
        "all": lambda: score(model, ids, "all", batch_size=n),
        "sweep": lambda: depth_sweep(model, ids, batch_size=n),
        "sleb": lambda: score(model, ids, "sleb", size=SIZE, batch_size=n),
    }
    spent = interleaved(calls, repeats=repeats)
    table = score(model, ids, "sleb", size=SIZE, batch_size=n)
    gone = table.sort_values("rank")["layer"].tolist()[:SIZE]
    passes, heads = sleb_counts(gone, count)
    once = {name: plain.time(sets) for name, sets in plain.questions(gone).items()}
    typical = {name: statistics.median(times) for name, times in spent.items()}
    return {
        "blocks": count,
        "tokens": ids.numel(),
        "seconds": typical | {f"plain {name}": value for name, value in once.items()},
        "leave-one-out / count": ratios(
            spent,
            "leave-one-out",
            lambda t: (count + 1) / 2 * t["blocks"] + (count + 1) * t["head"],
        ),
        "all / shared": ratios(spent, "all", lambda t: t["step"] + t["leave-one-out"]),
        "sweep / count": ratios(spent, "sweep", lambda t: t["forward"] + count * t["head"]),
        "sleb / count": ratios(spent, "sleb", lambda t: passes / count * t["blocks"] + heads * t["head"]),
        **{f"plain / {name}": value / typical[name] for name, value in once.items()},
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny:llama:16", "smollm2-135m"])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.models:
        model, tokenizer = load_model(name)
        ids = load_tokens(
            "docstrings", tokenizer, sequences=arguments.sequences, length=arguments.length, seed=0
        )
        results[name] = measure(model, ids, repeats=arguments.repeats)
        if not arguments.json:
            print(name)
            for key, value in results[name].items():
                print(f"  {key}: {value:.2f}" if isinstance(value, float) else f"  {key}: {value}")
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
