"""Determinism: once more is the same bits; batch size and threads move numbers by rounding alone.

Run `python benchmarks/determinism.py [--json]`. A tiny model is probed, scored, evaluated and healed: once,
once more, then with other batch sizes and other numbers of threads. A difference is the largest of all
numbers, as a share of the largest value of the same measure. Then a small study is run and reported twice
from the command line, and the files compared, times and provenance apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from kills import contents, finish, study

import preln
from preln.evaluate import perplexity
from preln.models import tiny_model
from preln.probe import probe_tables

# what is promised: up to a hundred times what was measured, 6e-8, 1e-16 and 1e-4
BOUNDS = {torch.float32: 6e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
USUAL = (4, 1)  # batch size, threads
OTHERS = ((1, 1), (3, 1), (8, 1), (4, 2), (1, 4))
MEASURES = ("stream", "updates", "gradients", "norms")
METRICS = ("block_influence", "angular_sum", "taylor", "perplexity")
KEYS = ["measure", "site", "statistic", "layer"]
TIMED = ("tables/costs.tex", "tables/outcomes.tex", "figures/healing-curves-seconds")  # hold or draw seconds


@dataclass(frozen=True)
class Numbers:
    """What is measured of one model.

    Attributes:
        layers: The probe's values, by measure, site, statistic and layer.
        scores: Scores and ranks, by metric and layer.
        loss: In nats a token.
        weights: Of the healed model.
    """

    layers: Any
    scores: Any
    loss: float
    weights: list[torch.Tensor]


@dataclass(frozen=True)
class Moved:
    """How far numbers of one dtype move.

    Attributes:
        dtype: Its name.
        again: The largest difference of the same measurement once more.
        others: The largest difference with other batch sizes and threads.
        bound: What is promised.
        ranks: Whether every layer kept its rank.
    """

    dtype: str
    again: float
    others: float
    bound: float
    ranks: bool


def tokens(count: int = 8, length: int = 48) -> torch.Tensor:
    """Random token ids ``(count, length)``, the same every time."""
    return torch.randint(1, 512, (count, length), generator=torch.Generator().manual_seed(0))


def measured(dtype: torch.dtype, batch_size: int, threads: int) -> Numbers:
    """Probe, scores, loss and healed weights of one model."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model("llama", blocks=3).to(dtype).eval()
        told: dict[str, Any] = {"batch_size": batch_size, "bootstrap": 0, "measures": list(MEASURES)}
        layers = probe_tables(model, tokens(), **told).layers.set_index(KEYS)["value"]
        scores = preln.score(model, tokens(), metrics=list(METRICS)).set_index(["metric", "layer"])
        healed = preln.heal(model, tokens(), recipe="partial-1", steps=2, batch_size=4)
        loss = perplexity(model, tokens(), batch_size=batch_size).loss
        return Numbers(layers, scores, loss, [p.detach().double() for p in healed.parameters()])
    finally:
        torch.set_num_threads(before)


def worst(first: Numbers, second: Numbers) -> float:
    """The largest difference of two measurements, as a share of the largest value of the same measure."""
    found = [abs(first.loss - second.loss) / abs(first.loss)]
    for a, b, level in (
        (first.layers, second.layers, ["measure", "statistic"]),
        (first.scores["score"], second.scores["score"], "metric"),
    ):
        assert a.index.equals(b.index)
        scale = a.abs().groupby(level=level).transform("max").clip(lower=1e-30)
        found.append(float(((a - b).abs() / scale).max()))
    found += [
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(first.weights, second.weights, strict=True)
    ]
    return max(found)


def moved(dtype: torch.dtype) -> Moved:
    """Measure again, and with other batch sizes and threads."""
    usual = measured(dtype, *USUAL)
    others = [measured(dtype, *other) for other in OTHERS]
    return Moved(
        dtype=str(dtype).removeprefix("torch."),
        again=worst(usual, measured(dtype, *USUAL)),
        others=max(worst(usual, other) for other in others),
        bound=BOUNDS[dtype],
        ranks=all(usual.scores["rank"].equals(other.scores["rank"]) for other in others),
    )


def twice() -> dict[str, Any]:
    """Run a small study and its report twice, in fresh processes; ``{"files", "differences"}``.

    Raises:
        RuntimeError: One of them failed.
    """
    found: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "study.yaml"
        file.write_text(yaml.safe_dump(study("tiny:llama:6")), encoding="utf-8")
        for side in ("first", "second"):
            # of one name: a run's name stands in its report
            run, report = Path(name) / side / "run", Path(name) / side / "report"
            for words in (("run", str(file), "--out", str(run)), ("report", str(run), "--out", str(report))):
                _, error = finish(words)
                if error:
                    raise RuntimeError(f"{words[0]}: {error}")
            made = {key: value for key, value in contents(report).items() if _is_lasting(key)}
            found.append({f"run/{k}": v for k, v in contents(run).items()} | made)
    first, second = found
    names = sorted(first.keys() | second.keys())
    return {"files": len(names), "differences": [n for n in names if first.get(n) != second.get(n)]}


def _is_lasting(name: str) -> bool:
    """Whether a file of a report can be compared; columns of seconds and bytes of memory are left out."""
    return name.startswith(("tables/", "figures/")) and not name.startswith(TIMED)


def table(rows: Sequence[Moved]) -> str:
    """How far numbers move, as a Markdown table."""
    lines = [
        "| dtype | once more | other batch sizes and threads | promised | same ranks |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        numbers = f"{row.again:.1g} | {row.others:.1g} | {row.bound:.0g}"
        lines.append(f"| {row.dtype} | {numbers} | {'yes' if row.ranks else '**no**'} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows, again = [moved(dtype) for dtype in BOUNDS], twice()
    if arguments.json:
        print(json.dumps({"moved": [vars(row) for row in rows], "twice": again}))
    else:
        print(table(rows), again, sep="\n\n")
    broken = any(row.again or row.others > row.bound or not row.ranks for row in rows)
    return int(broken or bool(again["differences"]))


if __name__ == "__main__":
    sys.exit(main())
