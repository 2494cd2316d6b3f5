"""How near every recipe comes to what its matrix products take by themselves.

Run `python benchmarks/heal_cost.py [--json]`. A step of every recipe is counted (`preln.heal.cost`), and the
rate of the machine is measured at the shapes of that model's own linear maps, forward and both ways back,
in the same process, in turns with the steps. A recipe's rate weighs the shapes by their share of its
operations; its adapters, the products of attention and a teacher's pass are taken at that rate too, though
they may run slower. Printed are

- `at rate`: the seconds that the operations take at that rate;
- `step`: the least seconds of forward and backward passes, and `ratio`, over `at rate`;
- `update`: the least seconds of clipping and optimizer, which are no products; `with it`, the ratio of both.

Recipes whose frozen prefix can be stored come twice, without stored states and with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from preln import load_model, load_tokens
from preln.heal import Cache, Examples, TrainingSettings, as_examples, get_recipe
from preln.heal.cost.operations import Operations, operations
from preln.heal.cost.shapes import Product
from preln.heal.prefix.cache import frozen_depth
from preln.heal.preparing.prepare import prepare
from preln.heal.training.optimizers import make_optimizer
from preln.heal.training.step import Stepper
from preln.heal.training.teacher import Teacher
from preln.models import drop_blocks, find_blocks
from preln.models.tail import Tail

AIM = 1.25
RECIPES = ["head", "partial-1", "partial-2", "partial-3", "full", "lora", "dora", "qlora", "uidl"]
RECIPES += ["distill", "seam"]
PASSES = ("forward", "to_input", "to_weight")
Shape = tuple[str, int, int]


def best(call: Callable[[], Any], times: int = 3) -> float:
    """Return the least seconds of some calls."""
    least = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least


def shape(row: Product) -> Shape:
    """Return what the speed of a product depends on: head or block, inputs and outputs."""
    return row.kind, row.inputs, row.outputs


@torch.inference_mode()
def rates(shapes: Iterable[Shape], tokens: dict[str, int]) -> dict[tuple[Shape, str], float]:
    """Return operations a second of the product of every shape and of its two gradients."""
    found = {}
    for each in shapes:
        kind, inputs, outputs = each
        n = tokens[kind]
        x, w, g = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(n, outputs)
        spent = {
            "forward": best(lambda x=x, w=w: F.linear(x, w)),
            "to_input": best(lambda g=g, w=w: g @ w),
            "to_weight": best(lambda g=g, x=x: g.t() @ x),
        }
        found |= {(each, name): 2 * n * inputs * outputs / seconds for name, seconds in spent.items()}
    return found


def at_rate(found: Operations, rate: dict[tuple[Shape, str], float]) -> float:
    """Return the seconds a token of a step at the measured rates."""
    known = [row for row in found.products if row.kind in ("map", "head")]
    parts = [(float(getattr(row, name)), rate[shape(row), name]) for row in known for name in PASSES]
    spent, counted = sum(o / r for o, r in parts), sum(o for o, _ in parts)
    return found.total * spent / counted


class Run:
    """One recipe, ready to step."""

    def __init__(
        self, model: Any, name: str, batch: Examples, *, teacher: Any, drop: Any, cache: Cache | None
    ) -> None:
        recipe = get_recipe(name)
        self.batch, self.rows = batch, list(range(len(batch)))
        settings = TrainingSettings(steps=1, batch_size=len(batch), learning_rate=1e-5)
        prepared = prepare(model, recipe, drop=drop if recipe.needs_drop else None)
        depth, prefix = 0, None
        if cache is not None:
            depth = frozen_depth(recipe, len(find_blocks(model)[1]))
            prefix = cache.states(model, batch, depth, batch_size=len(batch), label="cost")
        target = Teacher(teacher, drop) if recipe.teacher else None
        self.stepper = Stepper(prepared, settings, depth=depth, prefix=prefix, teacher=target)
        self.parameters = list(prepared.parameters.values())
        self.optimizer, _ = make_optimizer(self.parameters, settings)
        self.stepper.training_mode()

    def passes(self) -> None:
        """Forward and backward."""
        self.stepper.gradients(self.batch, self.rows, 0)

    def update(self) -> None:
        """What the loop does with a gradient."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, steps: int) -> tuple[float, float]:
        """Return the least seconds of the passes and of the update, after one step that warms up."""
        spent = []
        for _ in range(steps + 1):
            spent.append((best(self.passes, 1), best(self.update, 1)))
        return min(p for p, _ in spent[1:]), min(u for _, u in spent[1:])


def measure(
    model: Any,
    teacher: Any,
    drop: list[int],
    batch: Examples,
    recipes: list[str],
    *,
    repeats: int,
    steps: int,
) -> dict[str, dict[str, float]]:
    """Return, of every recipe, operations, seconds and ratios."""
    count, length = len(find_blocks(model)[1]), batch.input_ids.shape[1]
    share = batch.supervised / batch.input_ids.numel()
    runs = [(name, False) for name in recipes]
    runs += [(name, True) for name in recipes if frozen_depth(get_recipe(name), count)]
    told: dict[str, Any] = {"length": length, "supervised": share, "pass_tokens": batch.tokens}
    counts = {
        (name, cached): operations(
            model,
            name,
            cached=cached,
            drop=drop if get_recipe(name).needs_drop else None,
            teacher=teacher if get_recipe(name).teacher else None,
            **told,
        )
        for name, cached in runs
    }
    products = [row for found in counts.values() for row in found.products]
    shapes = {shape(row) for row in products if row.kind in ("map", "head")}
    tokens = {"map": batch.tokens, "head": min(Tail(model).rows, batch.supervised)}
    rate: dict[tuple[Shape, str], float] = {}
    spent: dict[tuple[str, bool], tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        depths = sorted({frozen_depth(get_recipe(name), count) for name, cached in runs if cached})
        cache = Cache(folder, mode="on", depths=depths)
        for _ in range(repeats):
            for each in runs:
                for key, value in rates(shapes, tokens).items():
                    rate[key] = max(value, rate.get(key, 0.0))
                name, cached = each
                run = Run(model, name, batch, teacher=teacher, drop=drop, cache=cache if cached else None)
                now = run.measure(steps)
                del run  # before the next model is copied
                spent[each] = tuple(map(min, zip(now, spent.get(each, now), strict=True)))  # pyright: ignore
    results = {}
    for name, cached in runs:
        found, (passes, update) = counts[name, cached], spent[name, cached]
        ideal = at_rate(found, rate) * batch.input_ids.numel()
        total = found.total * batch.input_ids.numel()
        results[f"{name}, cached" if cached else name] = {
            "gigaoperations": total / 1e9,
            "rate": total / ideal / 1e9,
            "at rate": ideal,
            "step": passes,
            "ratio": passes / ideal,
            "update": update,
            "with it": (passes + update) / ideal,
        }
    return results


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all recipes")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a recipe and round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.models:
        teacher, tokenizer = load_model(name)
        blocks = len(find_blocks(teacher)[1])
        drop = list(range(20, 28)) if name.startswith("smollm2") else [blocks - 2]
        model = drop_blocks(teacher, drop)
        ids = load_tokens(
            "docstrings", tokenizer, sequences=arguments.sequences, length=arguments.length, seed=0
        )
        results[name] = measure(
            model,
            teacher,
            drop,
            as_examples(ids),
            arguments.recipes,
            repeats=arguments.repeats,
            steps=arguments.steps,
        )
        if not arguments.json:
            print(f"{name}, {torch.get_num_threads()} threads; aim: ratio at most {AIM}")
            for recipe, values in results[name].items():
                told = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
                print(f"  {recipe}: {told}")
    if arguments.json:
        print(json.dumps({"aim": AIM, "threads": torch.get_num_threads(), "models": results}))


if __name__ == "__main__":
    main()
