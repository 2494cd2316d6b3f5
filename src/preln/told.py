"""What verbs print and return: of what was measured a moment ago, or of what the same command had stored."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.files import read_json

if TYPE_CHECKING:
    import pandas as pd

    from preln.prune import Plan

Said = dict[str, Any]


def probe(arguments: argparse.Namespace, layers: pd.DataFrame, manifest: dict[str, Any]) -> Said:
    """Print a probe's answers; the summary."""
    from preln.probe import answers, describe

    print(describe(layers, manifest["notes"]))
    keys = ("placement", "loss", "dtype", "attn_implementation", "num_blocks")
    return {"out": arguments.out, "answers": answers(layers), **{key: manifest[key] for key in keys}}


def probe_again(arguments: argparse.Namespace) -> Said:
    """The same of a stored probe."""
    return probe(arguments, _table(arguments, "layers"), _manifest(arguments))


def score(
    arguments: argparse.Namespace, table: pd.DataFrame, extra: dict[str, pd.DataFrame], size: int
) -> Said:
    """Print ranks, and what following them costs if that was measured; the summary."""
    from preln.prune import describe_scores, orders

    print(describe_scores(table))
    said: Said = {"protect": arguments.protect, "size": size}
    if extra:
        matrix = extra["correlations"].pivot(index="metric", columns="other", values="spearman")
        print(f"\nrank correlation of the orders of blocks\n{matrix.round(2).to_string()}")
        print(f"\nheld-out loss without the first blocks\n{extra['damage'].round(4).to_string(index=False)}")
        damage = extra["damage"].astype(object).where(extra["damage"].notna(), None)
        said["damage"] = damage.to_dict("records")
    return said | {"out": arguments.out, "order": orders(table)}


def score_again(arguments: argparse.Namespace) -> Said:
    """The same of stored scores."""
    names = ("correlations", "damage") if arguments.damage else ()
    extra = {name: _table(arguments, name) for name in names}
    return score(arguments, _table(arguments, "scores"), extra, _manifest(arguments)["size"])


def prune(arguments: argparse.Namespace, plan: Plan) -> Said:
    """The summary of a plan that was carried out."""
    halves = {"drop_attention": list(plan.drop_attention), "drop_mlp": list(plan.drop_mlp)}
    said: Said = halves if any(halves.values()) else {}
    if plan.method != "remove":
        said["method"] = plan.method
    return {"out": arguments.out, "drop": list(plan.drop), "keep": list(plan.keep)} | said


def prune_again(arguments: argparse.Namespace) -> Said:
    """The same of a stored plan, which is printed."""
    from preln.prune import read_plan

    plan = read_plan(Path(arguments.out) / "plan.yaml")
    print(plan.describe())
    return prune(arguments, plan)


def heal(arguments: argparse.Namespace, manifest: dict[str, Any]) -> Said:
    """Print the loss before and after; the summary."""
    keys = ("loss_before", "loss_after", "trainable_parameters", "steps", "tokens", "seconds", "cache")
    said = {key: manifest[key] for key in keys}
    print(f"validation loss {said['loss_before']:.4f} -> {said['loss_after']:.4f}: {arguments.out}")
    return {"out": arguments.out, **said}


def sweep(arguments: argparse.Namespace, lines: pd.DataFrame) -> Said:
    """Print the rows of a sweep, the best first; the summary."""
    from preln.evaluate.api import records  # of one seed the interval is none

    print(lines.to_string(index=False))
    return {"out": arguments.out, "best": records(lines)[0]}


def heal_again(arguments: argparse.Namespace) -> Said:
    """The same of a stored healing run or sweep."""
    if arguments.sweep:
        return sweep(arguments, _table(arguments, "summary"))
    return heal(arguments, _manifest(arguments))


def evaluate(arguments: argparse.Namespace, result: dict[str, Any]) -> Said:
    """Print what a model weighs, as JSON; the summary is the same."""
    from preln.evaluate.api import records

    shown = {"tasks": result["tasks"], "mean_acc": result["mean_acc"], "perplexity": result.get("perplexity")}
    shown |= {part: result[part] for part in ("strided", "generation") if part in result}
    shown |= {part: records(result[part]) for part in _FRAMES if part in result}
    print(json.dumps(shown, indent=2))
    return {"out": arguments.out, **shown}


def evaluate_again(arguments: argparse.Namespace) -> Said:
    """The same of stored results."""
    out = Path(arguments.out)
    frames = {part: _table(arguments, part) for part in _FRAMES if (out / f"{part}.parquet").is_file()}
    return evaluate(arguments, {**read_json(out / "results.json"), **frames})


_FRAMES = ("comparison", "positions", "speed", "speedup")


def _table(arguments: argparse.Namespace, name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(Path(arguments.out) / f"{name}.parquet")


def _manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = read_json(Path(arguments.out) / "manifest.json")
    return found
