"""What healing costs: with and without stored states, against adapters, against the plain way.

Run `python benchmarks/heal.py [--json]`. On SmolLM2 less blocks 20 to 27, on a tiny model of 24 blocks
(`tiny:llama:24`, 64 channels, where the interpreter takes much of the time), and on one of 24 blocks of 256
channels with the same small head (`deep`), in one process, every run with the same rows and the same
supervised tokens:

- `cached`: partial-3 for two epochs, its frozen prefix computed once, that pass included;
- `uncached`: the same without stored states; `later`: the same with the states already there;
- `plain partial`: the same in a loop that one would write, transformers' loss, the head at every position;
- `lora`: LoRA as this project runs it; `plain lora`: peft's model in such a loop; `padded lora`: the same on
  one row a window, padded, as published scripts run it;
- `sweep / apart`: head and partial-1 to 3 at four learning rates over one cache, against each by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preln import load_model, load_tokens
from preln.base.memory import peak_bytes, reset_peak
from preln.heal import Cache, Examples, TrainingSettings, sweep, train
from preln.heal.preparing.prepare import prepare
from preln.heal.rows.examples import IGNORED
from preln.models import drop_blocks, tiny_tokenizer

CPU = torch.device("cpu")
RATES = (1e-5, 1e-4, 3e-4, 1e-3)


def responses(ids: torch.Tensor, share: float) -> Examples:
    """Return rows whose last share counts in the loss, as a response after its instruction does."""
    labels = ids.clone()
    labels[:, : int(ids.shape[1] * (1 - share))] = IGNORED
    return Examples(ids, labels)


def padded(rows: Examples) -> Examples:
    """Return every row by itself in a window of twice its length."""
    n, t = rows.input_ids.shape
    ids = torch.cat([rows.input_ids, torch.zeros(n, t, dtype=torch.long)], 1)
    labels = torch.cat([rows.labels, torch.full((n, t), IGNORED)], 1)
    mask = torch.cat([torch.ones(n, t, dtype=torch.long), torch.zeros(n, t, dtype=torch.long)], 1)
    return Examples(ids, labels, mask)


def plain(model: Any, rows: Examples, settings: TrainingSettings, recipe: str = "lora") -> None:
    """Train in the loop that one would write: transformers' own loss, the head at every position."""
    prepared = prepare(model, recipe)
    optimizer = torch.optim.AdamW(prepared.parameters.values(), lr=settings.learning_rate)
    prepared.training_mode()
    for step in range(settings.steps or 0):
        places = [(step * settings.batch_size + i) % len(rows) for i in range(settings.batch_size)]
        batch = rows.take(places)
        mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        loss = prepared.model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False, **mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds and peak resident MiB of a call."""
    reset_peak(CPU)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began, peak_bytes(CPU) / 2**20


def measure(model: Any, rows: Examples, *, batch: int, repeats: int) -> dict[str, Any]:
    """Return the least seconds of every run, its peak memory, and the ratios."""
    epochs = 2
    settings = TrainingSettings(
        steps=epochs * len(rows) // batch, batch_size=batch, learning_rate=1e-4, checkpoint_every=None
    )

    def heal(recipe: str, folder: str | None) -> None:
        cache = None if folder is None else Cache(folder, mode="on")
        train(model, rows, recipe=recipe, settings=settings, cache=cache)

    def fresh(run: Callable[[str], Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run(folder)

    with tempfile.TemporaryDirectory() as kept:
        heal("partial-3", kept)
        calls: dict[str, Callable[[], Any]] = {
            "cached": lambda: fresh(lambda folder: heal("partial-3", folder)),
            "uncached": lambda: heal("partial-3", None),
            "later": lambda: heal("partial-3", kept),
            "lora": lambda: heal("lora", None),
            "plain partial": lambda: plain(model, rows, settings, "partial-3"),
            "plain lora": lambda: plain(model, rows, settings),
            "padded lora": lambda: plain(model, padded(rows), settings),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                found[name].append(timed(call))
    seconds = {name: min(time for time, _ in rounds) for name, rounds in found.items()}
    memory = {name: max(peak for _, peak in rounds) for name, rounds in found.items()}
    return {
        "tokens": rows.tokens,
        "supervised": rows.supervised,
        "seconds": seconds,
        "peak MiB": memory,
        "uncached / cached": seconds["uncached"] / seconds["cached"],
        "plain partial / cached": seconds["plain partial"] / seconds["cached"],
        "plain lora / cached": seconds["plain lora"] / seconds["cached"],
        "padded lora / cached": seconds["padded lora"] / seconds["cached"],
        "lora / cached": seconds["lora"] / seconds["cached"],
        "uncached / later": seconds["uncached"] / seconds["later"],
        "memory, cached / plain lora": memory["cached"] / memory["plain lora"],
    }


def sweeps(model: Any, rows: Examples, *, batch: int) -> dict[str, float]:
    """Return the seconds of a sweep over one cache, and of its runs by themselves."""
    recipes = ["head", "partial-1", "partial-2", "partial-3"]
    told: dict[str, Any] = {"batch_size": batch, "epochs": 1, "checkpoint_every": 1000}

    def together(folder: str) -> None:
        cache = Cache(Path(folder) / "prefix", mode="on")
        sweep(model, rows, recipes=recipes, grid={"learning_rate": RATES}, folder=folder, cache=cache, **told)

    with tempfile.TemporaryDirectory() as folder:
        shared, _ = timed(lambda: together(folder))
    apart = 0.0
    for recipe in recipes:
        settings = TrainingSettings(**told, learning_rate=1e-4)
        spent, _ = timed(lambda r=recipe, s=settings: train(model, rows, recipe=r, settings=s))
        apart += len(RATES) * spent  # the rate does not change what a run costs
    return {"sweep": shared, "apart": apart, "sweep / apart": shared / apart}


def load(name: str) -> tuple[Any, Any]:
    """Return a model and a tokenizer: SmolLM2 without eight blocks, a deep one, or what the name says."""
    if name == "deep":
        config = LlamaConfig(
            **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512},
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tiny_tokenizer()
    model, tokenizer = load_model(name)
    return drop_blocks(model, range(20, 28)) if name.startswith("smollm2") else model, tokenizer


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny:llama:24", "deep", "smollm2-135m"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--response", type=float, default=0.5, help="share of tokens that count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.models:
        model, tokenizer = load(name)
        ids = load_tokens(
            "docstrings", tokenizer, sequences=arguments.sequences, length=arguments.length, seed=0
        )
        rows = responses(ids, arguments.response)
        results[name] = measure(model, rows, batch=arguments.batch_size, repeats=arguments.repeats)
        results[name] |= sweeps(model, rows, batch=arguments.batch_size)
        if not arguments.json:
            print(name)
            for key, value in results[name].items():
                print(f"  {key}: {value:.2f}" if isinstance(value, float) else f"  {key}: {value}")
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
