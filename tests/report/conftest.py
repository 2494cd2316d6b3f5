"""A synthetic run folder of a 6-block model, with hostile strings where data could carry them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

L = 6
HOSTILE = '<script>alert("x")</script> & 50% of $a_1$ {b} \\end{document}'
METRICS = ("reverse", "block_influence", "first_order_damage")
RECIPES = ("head", "partial-3", "lora")
DENSE = 2.86


def write_step(run: Path, name: str, kind: str, contents: dict[str, Any]) -> None:
    """Write a step folder: frames as parquet, dictionaries as JSON, bytes as they are, then `step.json`."""
    folder = run / name
    folder.mkdir(parents=True)
    files = {}
    for file, content in contents.items():
        if isinstance(content, pd.DataFrame):
            content.to_parquet(folder / file, index=False)
        elif isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        files[file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    step = {
        "id": name,
        "kind": kind,
        "status": "finished",
        "seconds": 12.5,
        "inputs_hash": "0" * 64,
        "files": files,
    }
    (folder / "step.json").write_text(json.dumps({**step, "inputs": {}}), encoding="utf-8")


def layers(blocks: int) -> pd.DataFrame:
    """Plausible measures by layer."""
    noise = np.random.default_rng(0)
    rows = []

    def add(
        measure: str, site: str, layer: int, value: float, spread: float = 0.1, statistic: str = "mean"
    ) -> None:
        rows.append(
            {
                **{"measure": measure, "layer": layer, "site": site, "statistic": statistic, "value": value},
                **{"low": value * (1 - spread), "high": value * (1 + spread), "n": 8},
            }
        )

    for block in range(blocks):
        jitter = float(np.exp(0.1 * noise.standard_normal()))
        add("residual_rms", "block", block, 0.12 * (1 + 4 * block) ** 1.4 * jitter)
        add("residual_rms", "block", block, 99.0, statistic="max")
        add("grad_hidden", "block", block, 0.04 / (1 + block) * jitter)
        add(
            "grad_param",
            "block",
            block,
            0.5 * (1.4 - math.sin(math.pi * (block + 1) / (blocks + 1))) * jitter,
        )
        for site, gain in (("attention", 3.0), ("mlp", 2.0)):
            add("norm_sigma", site, block, gain / (1 + block) * jitter)
            add("norm_sigma_bound", site, block, 1.3 * gain / (1 + block) * jitter, spread=0.0)
    add("norm_sigma", "final_norm", blocks, 0.6)
    add("norm_sigma_bound", "final_norm", blocks, 0.8)
    return pd.DataFrame(rows)


def scores(blocks: int) -> pd.DataFrame:
    """Scores and ranks of every block under each metric."""
    noise = np.random.default_rng(1)
    frames = []
    for metric in METRICS:
        value = noise.normal(size=blocks) * 0.1 + np.linspace(1, 0.1, blocks)
        value = np.arange(blocks, 0, -1.0) if metric == "reverse" else value
        value = value - 0.2 if metric == "first_order_damage" else value
        rank = pd.Series(value).rank(method="first").astype(int) - 1
        frames.append(pd.DataFrame({"metric": metric, "layer": range(blocks), "score": value, "rank": rank}))
    return pd.concat(frames, ignore_index=True)


def damage(blocks: int) -> pd.DataFrame:
    """Measured damage of each block's removal: large at the ends."""
    delta = 0.05 + 3.0 * np.exp(-2.0 * np.arange(blocks)) + 0.4 * (np.arange(blocks) == blocks - 1)
    table = pd.DataFrame({"layer": range(blocks), "loss": DENSE + delta, "delta": delta})
    return table.assign(low=delta * 0.9, high=delta * 1.1, n=8)


def pairs(blocks: int) -> pd.DataFrame:
    """Angular distances across every run of blocks: larger for longer ones, least in the middle."""
    rows = []
    for start in range(blocks):
        for size in range(1, blocks - start + 1):
            distance = 0.05 * size + 0.01 * abs(start + size / 2 - blocks / 2)
            rows.append({"start": start, "size": size, "angular_distance": distance})
    return pd.DataFrame(rows).assign(angular_distance_last_token=lambda t: t["angular_distance"] * 0.9)


def documents(tasks: dict[str, float], loss: float) -> pd.DataFrame:
    """A hundred documents a task; with a loss, piqa loses eight and the others twenty, and win twelve."""
    rows = []
    for task, acc in tasks.items():
        first = 0 if not loss else 8 if task == "piqa" else 20
        right = range(first, first + round(100 * (acc - loss)))
        rows += [(task, i, f"{task}-{i}", float(i in right)) for i in range(100)]
    return pd.DataFrame(rows, columns=["task", "doc_id", "doc_hash", "acc"])


def claims() -> list[dict[str, Any]]:
    """A proved, a refuted and an open theorem, and a hypothesis."""

    def claim(id: str, status: str, evidence: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        base = {
            "id": id,
            "kind": "theorem",
            "family": "Depth" if id.startswith("STK") else "Normalisation layers",
            "title": f"Title of {id}",
            "statement": "σ(B) = 1/√(ms + ε) for d ≥ 2",
        }
        return {
            **base,
            "assumptions": ["ε > 0"],
            "uses": [],
            "status": status,
            "source": "[R]",
            "evidence": evidence,
            **more,
        }

    symbolic = {
        "kind": "symbolic",
        "outcome": "pass",
        "detail": {"method": "eigen-equations", "d": "every d ≥ 1"},
    }
    counter = {
        "kind": "counterexample",
        "outcome": "pass",
        "detail": {"d": 2, "x": [1.0, -1.0], "left": 1.2, "right": 1.1, "corrected_by": "CMP-PAPER-LATE"},
    }
    return [
        claim(
            "RMS-NORM",
            "proved",
            [symbolic, {"kind": "smt", "outcome": "pass", "detail": {"answer": "unsat"}}],
        ),
        claim("CMP-PAPER", "refuted", [counter], uses=["RMS-NORM"], statement=HOSTILE),
        claim("CMP-PAPER-LATE", "proved", [symbolic], uses=["RMS-NORM"]),
        claim("STK-GROWTH", "open", []),
        claim("HYP-SIGMA", "untested", [], kind="hypothesis", statement="σ² > 1 at every norm's input"),
    ]


def verdicts() -> list[dict[str, Any]]:
    """One verdict of each status, one with a hostile note."""
    ids = ("HYP-ATTEN-HIDDEN", "HYP-ATTEN-PARAM", "HYP-PREDICTS", "HYP-PARTIAL")
    statuses = ("supported", "unsupported", "inconclusive", "untested")
    return [
        {
            **{
                "id": id,
                "statement": "|∂L/∂x[l]| falls with depth",
                "status": status,
                "expected": "below threshold",
            },
            **{
                "statistic": "Spearman rank correlation of depth and gradient",
                "value": None if i == 3 else -0.97 + i / 2,
            },
            **{"interval": None if i == 3 else [-0.99 + i / 2, -0.9 + i / 2], "threshold": -0.5, "n": 8},
            **{
                "note": HOSTILE if i == 1 else "",
                "evidence": ["probe/layers.parquet", "javascript:alert(1)"],
            },
        }
        for i, (id, status) in enumerate(zip(ids, statuses, strict=True))
    ]


def write_run(path: Path, blocks: int = L, drop: int = 2) -> Path:
    """Write a whole run; `blocks` and `drop` can be raised to see how a real one would look."""
    path.mkdir(parents=True)
    manifest = {
        **{
            "schema_version": 1,
            "versions": {"torch": "2.13.0", "preln": "0.1.0"},
            "git_commit": "abc123",
            "dirty": False,
        },
        **{
            "device": "cpu",
            "dtype": "float32",
            "attn_implementation": "eager",
            "seeds": {"data": 0, "bootstrap": 0},
        },
        **{
            "model": {"name": "tiny:llama", "num_blocks": blocks, "sha256": "f" * 64},
            "data": {"sha256": "e" * 64, "healing_validation": {"source": {"versions": {"numpy": "2.4.6"}}}},
        },
        **{"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T00:10:00Z", "status": "finished"},
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (path / "config.yaml").write_text(
        yaml.safe_dump({"model": "tiny:llama", "title": HOSTILE}), encoding="utf-8"
    )
    write_step(path, "verify", "verify", {"ledger.json": {"schema_version": 1, "claims": claims()}})
    write_step(path, "probe", "probe", {"layers.parquet": layers(blocks), "pairs.parquet": pairs(blocks)})
    table = scores(blocks)
    write_step(path, "score", "score", {"scores.parquet": table})
    write_step(path, "damage", "damage", {"damage.parquet": damage(blocks)})
    for i, metric in enumerate(METRICS):
        chosen = table[table["metric"] == metric].sort_values("rank")["layer"].tolist()[:drop]
        _prune_and_heal(path, metric, sorted(chosen), raw=DENSE + 12 / (1 + 2 * i))
    tasks = {"piqa": 0.68, "arc_easy": 0.55, "hellaswag": 0.4, HOSTILE: 0.5}
    for name, loss in (("dense", 0.0), (f"heal-reverse-{drop}-lora", 0.08)):
        numbers = {task: {"acc": acc - loss, "acc_stderr": 0.04, "n": 100} for task, acc in tasks.items()}
        contents = {"results.json": {"model": name, "tasks": numbers}}
        contents["documents.parquet"] = documents(tasks, loss)
        write_step(path, f"evaluate-{name}", "evaluate", contents)
    write_step(path, "decide", "decide", {"verdicts.json": {"verdicts": verdicts()}})
    unfinished = path / "heal-reverse-2-qlora"
    unfinished.mkdir()
    (unfinished / "result.json").write_text('{"loss_after": "UNFINISHED"}', encoding="utf-8")
    return path


def _prune_and_heal(path: Path, metric: str, drop: list[int], raw: float) -> None:
    result = {
        "metric": metric,
        "drop": drop,
        "loss": raw,
        "low": raw - 0.1,
        "high": raw + 0.1,
        "tokens": 1016,
    }
    result |= {"perplexity": math.exp(raw), "dense_loss": DENSE, "num_blocks": L - len(drop)}
    name = f"{metric}-{len(drop)}"
    write_step(path, f"prune-{name}", "prune", {"result.json": result})
    for i, recipe in enumerate(RECIPES):
        losses = DENSE + (raw - DENSE) * np.exp(-np.arange(6) * (0.1 + 0.1 * i))
        curve = pd.DataFrame({"step": range(6), "tokens": np.arange(6) * 1024, "seconds": np.arange(6) * 8.0})
        validation = curve.assign(split="validation", loss=losses, learning_rate=1e-4)
        training = pd.concat([validation, validation.assign(split="train", loss=losses + 0.3)])
        healed = {
            "metric": metric,
            "drop": drop,
            "recipe": recipe,
            "learning_rate": 1e-4,
            "steps": 5,
            "tokens": 5120,
        }
        healed |= {"trainable_parameters": 10_000 * (i + 1), "total_parameters": 500_000, "seconds": 40.0 + i}
        healed |= {"peak_memory_bytes": (i + 1) * 2**30 + len(metric)}
        healed |= {
            "loss_before": raw,
            "loss_after": losses[-1],
            "low": losses[-1] - 0.05,
            "high": losses[-1] + 0.05,
        }
        contents = {"training.parquet": training, "result.json": healed, "weights.safetensors": b"weights"}
        write_step(path, f"heal-{name}-{recipe}", "heal", contents)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A fresh run folder that the test may damage."""
    return write_run(tmp_path / "quickstart")


@pytest.fixture(name="write_step")
def _write_step() -> Any:
    """The function that writes a step folder."""
    return write_step


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report built once for every test that only looks at it; the run lies beside it."""
    from preln.report import build_report

    folder = tmp_path_factory.mktemp("built")
    return build_report([write_run(folder / "quickstart")], folder / "report").parent


@pytest.fixture
def hostile() -> str:
    """The string that data carries to try and break out."""
    return HOSTILE
