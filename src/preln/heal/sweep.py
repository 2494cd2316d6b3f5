"""Recipes, settings and seeds against one another: many runs over one cache, one table."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.base.errors import InputError
from preln.base.files import read_json, write_json
from preln.base.stats import bootstrap_interval
from preln.heal.api import Rows, train
from preln.heal.options.recipe import Recipe
from preln.heal.options.recipes import get_recipe
from preln.heal.prefix.cache import Cache, frozen_depth
from preln.heal.rows.examples import as_examples
from preln.models import find_blocks, model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED = ("loss_before", "loss_after", "best_loss", "tokens", "supervised_tokens", "steps", "seconds",
            "wall_seconds", "peak_memory_bytes", "trainable_parameters")  # fmt: skip


def sweep(
    model: PreTrainedModel,
    tokens: Rows,
    *,
    recipes: Sequence[str | Recipe],
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    validation: Rows | None = None,
    tokenizer: Any = None,
    folder: str | os.PathLike[str],
    cache: Cache | None = None,
    teacher: PreTrainedModel | None = None,
    drop: Sequence[int] | None = None,
    packed: bool = True,
    template: str | None = None,
    **overrides: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Heal by every recipe with every combination of settings and every seed.

    All runs see the same rows; those whose prefix is frozen share one pass over it. A run that has ended is
    stored in ``folder`` and not repeated; one that was stopped goes on from its last checkpoint.

    Args:
        model: A pruned model; left as it is.
        tokens: Token ids ``[n, T]``, or rows.
        recipes: Names, or recipes.
        grid: By the name of a training setting, the values to try.
        seeds: Runs of each, with seeds 0, 1, …
        validation: Held-out data.
        tokenizer: Needed for rows of text.
        folder: Where finished runs, checkpoints and the cache are kept.
        cache: Where and how prefixes are stored; by default in ``folder``, wherever that saves passes.
        teacher: The unpruned model, for recipes that learn from it.
        drop: The blocks that were removed from it.
        packed: Whether windows hold several short rows; see :func:`preln.heal.train`.
        template: Of instruction rows; that of the first recipe if None, since all see the same rows.
        **overrides: Settings of all runs.

    Returns:
        One row a run (recipe, the grid's settings, seed, losses, tokens, seconds, peak memory, parameters),
        and the histories of all runs, with the same first columns.

    Raises:
        InputError: A recipe, setting or value that does not exist; a stored run of another sweep.
    """
    root, values = Path(folder), dict(grid or {})
    chosen = [get_recipe(name) for name in recipes]
    plan = [
        (recipe, dict(zip(values, combination, strict=True)), seed)
        for recipe in chosen
        for combination in itertools.product(*values.values())
        for seed in range(seeds)
    ]
    if not plan:
        raise InputError("sweep: nothing to run: name at least one recipe, one value and one seed")
    for recipe, changed, seed in plan:  # every mistake is found before the first run
        recipe.settings_for(**{**overrides, **changed, "seed": seed})
    form: dict[str, Any] = {"tokenizer": tokenizer, "length": max(recipe.length for recipe in chosen)}
    form |= {"supervise": chosen[0].supervise, "template": template or chosen[0].template, "packed": packed}
    how: dict[str, Any] = {"teacher": teacher, "drop": drop}
    examples = as_examples(tokens, **form)
    held_out = None if validation is None else as_examples(validation, **form, name="validation data")
    count = len(find_blocks(model)[1])
    shared = cache or Cache(root / "prefix")
    shared.depths = sorted({d for d in (frozen_depth(r, count) for r in chosen) if d})
    common = {
        "model": model_fingerprint(model),
        "train": examples.fingerprint(),
        "validation": None if held_out is None else held_out.fingerprint(),
        "overrides": {k: v for k, v in overrides.items() if v is not None},
    }
    rows, histories = [], []
    for recipe, changed, seed in plan:
        told = {"recipe": recipe.name, **changed, "seed": seed}
        whole = {**told, **common, "described": recipe.described()}
        stored = root / "runs" / f"{recipe.name}-{_digest(whole)}.json"
        if not stored.exists():
            settings = recipe.settings_for(**{**overrides, **changed, "seed": seed})
            if held_out is None:
                settings = settings.replaced(select="last")
            result = train(
                model,
                examples,
                validation=held_out,
                recipe=recipe,
                settings=settings,
                directory=stored.with_suffix(".resume"),
                cache=shared,
                fingerprint=common["model"],
                **how,
            )
            history = result.history.to_dict("list")
            found = {name: result.manifest[name] for name in MEASURED}
            write_json(stored, {"told": told, **common, "found": found, "history": history})
            shutil.rmtree(stored.with_suffix(".resume"), ignore_errors=True)
        kept = read_json(stored)
        rows.append({**told, **kept["found"]})
        histories.append(pd.DataFrame({**dict.fromkeys(told), **kept["history"]}).assign(**told))
    return pd.DataFrame(rows), pd.concat(histories, ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Loss after healing over seeds, one row a recipe and combination, the lowest first.

    Returns:
        The columns in front of ``seed``, then loss, low, high (95 % over seeds; NaN with one), seeds, tokens,
        seconds, peak_memory_bytes, trainable_parameters (means over seeds).
    """
    keys = list(table.columns[: list(table.columns).index("seed")])
    rows = []
    for values, group in table.groupby(keys, sort=False, dropna=False):
        losses = group["loss_after"].to_numpy(np.float64)
        low, high = bootstrap_interval(losses)
        means = {
            name: float(np.mean(group[name].to_numpy(np.float64)))
            for name in ("tokens", "seconds", "peak_memory_bytes", "trainable_parameters")
        }
        told = dict(zip(keys, values if isinstance(values, tuple) else (values,), strict=True))
        rows.append({**told, "loss": losses.mean(), "low": low, "high": high, "seeds": len(losses), **means})
    return pd.DataFrame(rows).sort_values(by="loss", kind="stable", ignore_index=True)


def read_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """Settings and values from words such as ``learning_rate=1e-5,1e-4``.

    Raises:
        InputError: A word without a name or a value, a value that is no JSON word, or a name given twice.

    >>> read_grid(["learning_rate=1e-5,1e-4", "schedule=cosine"])
    {'learning_rate': [1e-05, 0.0001], 'schedule': ['cosine']}
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        parts = [part.strip() for part in text.split(",")]
        if not equals or not name or not all(parts):
            raise InputError(f"--sweep {word!r}: write name=value,value, such as learning_rate=1e-5,1e-4")
        if name in grid or name == "seed":
            raise InputError(
                f"--sweep {word!r}: {name} is given already: one --sweep a name, and seeds by --seeds"
            )
        grid[name] = [read_value(part) for part in parts]
    return grid


def read_value(text: str) -> Any:
    """A number, ``true``, ``false`` or ``null`` as such; any other word as text.

    Raises:
        InputError: A whole number of more than 12 digits, which is none of a recipe's.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if text.strip().lstrip("-").isdecimal() and len(text.strip()) > 13:
        raise InputError(f"{text[:40]}: too large a number: give one of at most 12 digits")
    return value


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
