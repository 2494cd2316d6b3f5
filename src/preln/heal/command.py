"""From what a user asks for to recipes, removed blocks and a sweep on disk."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.files import staged_directory, write_json, write_parquet
from preln.base.provenance import provenance
from preln.base.yaml_files import read_yaml
from preln.heal.options.recipe import Recipe
from preln.heal.options.recipes import get_recipe, override
from preln.heal.sweep import read_grid, read_value, summary, sweep
from preln.heal.training.workers import own_device
from preln.models.layers import parse_layers, sort_halves

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


def read_recipes(names: str, changes: Sequence[str], *, several: bool) -> list[Recipe]:
    """The recipes of comma-separated names, with ``name=value`` changes to each.

    Raises:
        InputError: An unknown recipe or field, or several recipes where one is wanted.
    """
    found = [get_recipe(name.strip()) for name in names.split(",")]
    if len(found) > 1 and not several:
        raise InputError(f"--recipe {names}: several recipes need --sweep: name one, or a --sweep NAME=V,V")
    fields = {}
    for word in changes:
        name, equals, text = word.partition("=")
        if not equals or not name.strip() or not text.strip():
            raise InputError(f"--set {word!r}: write it as name=value, such as rank=16")
        fields[name.strip().replace("-", "_")] = read_value(text.strip())
    return [override(recipe, **fields) if fields else recipe for recipe in found]


def spread(arguments: Any) -> tuple[dict[str, Any], str]:
    """Options of :func:`preln.heal.heal_model` for several processes, and the device to load the model on.

    A model that is to be sharded is loaded in main memory and reaches the devices in parts.

    Raises:
        InputError: Flags that do not go together.
    """
    if arguments.sweep and (arguments.shard == "on" or arguments.log != "none"):
        raise InputError("--sweep: takes neither --shard on nor --log: heal one recipe, or leave them out")
    if arguments.shard == "on" and arguments.device == "auto":
        raise InputError("--shard on: spreads the model itself: use --device cuda or cpu")
    device = own_device(arguments.device)
    if arguments.sweep:
        return {}, device
    options = {"shard": arguments.shard, "log": arguments.log}
    return (options | {"device": device}, "cpu") if arguments.shard == "on" else (options, device)


def dropped_blocks(model: str, layers: str | None) -> list[int] | None:
    """The blocks that were removed from the unpruned model, as named or as a checkpoint's plan tells.

    Raises:
        InputError: Anything but whole blocks and ascending ranges, or a plan that cannot be read.
    """
    plan = Path(model) / "plan.yaml"
    if layers is not None:
        found = sort_halves(parse_layers(layers))
        if found["drop_attention"] or found["drop_mlp"]:
            raise InputError(f"--dropped {layers!r}: name whole blocks: a half leaves no seam")
        return found["drop"]
    if not plan.is_file():
        return None
    try:
        stored = read_yaml(plan)
    except (OSError, InputError) as error:
        raise InputError(f"{plan}: cannot be read as YAML: name the blocks by --dropped") from error
    return list(stored["drop"]) if isinstance(stored, dict) and stored.get("drop") else None


def sweep_verb(
    model: PreTrainedModel,
    train: Any,
    held_out: Any,
    recipes: Sequence[Recipe],
    arguments: argparse.Namespace,
    told: dict[str, Any],
    settings: dict[str, Any],
) -> pd.DataFrame:
    """Run a sweep, write its tables and ``manifest.json`` under ``--out``, and return its summary.

    Raises:
        InputError: See :func:`preln.heal.sweep`.
    """
    folder, grid = f"{Path(arguments.out)}.resume", read_grid(arguments.sweep)
    start = provenance()
    table, histories = sweep(
        model,
        train,
        recipes=recipes,
        grid=grid,
        seeds=arguments.seeds,
        validation=held_out,
        folder=folder,
        **told,
        **settings,
    )
    lines = summary(table)
    with staged_directory(arguments.out, checksums=True) as staged:
        write_parquet(staged / "sweep.parquet", table)
        write_parquet(staged / "summary.parquet", lines)
        write_parquet(staged / "training.parquet", histories)
        facts = {"model": arguments.model, "data": arguments.data, "grid": grid, "seeds": arguments.seeds}
        spent = {"prefix_seconds": told["cache"].seconds}
        write_json(staged / "manifest.json", {**start, **facts, **spent})
    shutil.rmtree(folder, ignore_errors=True)
    return lines
