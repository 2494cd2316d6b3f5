"""When the states of a frozen prefix are stored, where, and for whom."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.progress import note
from preln.heal.options.recipe import Recipe
from preln.heal.options.settings import TrainingSettings
from preln.heal.prefix.states import DTYPES, Prefix, build_prefix, prefix_bytes
from preln.heal.rows.examples import Examples
from preln.models import find_blocks, model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("auto", "on", "off")


@dataclass
class Cache:
    """Stored states x[l] in front of the blocks that train, shared by every run that they fit.

    Attributes:
        folder: Where the files are kept; the caller's to remove.
        mode: ``on``, ``off``, or ``auto``: where it saves passes and fits the budget.
        dtype: How the numbers are stored: ``auto``, as the model has them, which repeats the uncached run;
            narrower ones round them.
        budget: Most bytes on disk a file, or None for what the disk has.
        depths: Depths to keep beside the one asked for, so that one pass serves several recipes.
        seconds: Time spent on filling files so far.
    """

    folder: str | os.PathLike[str]
    mode: str = "auto"
    dtype: str = "auto"
    budget: int | None = None
    depths: Sequence[int] = ()
    seconds: float = 0.0
    _held: dict[tuple[str, str], Prefix] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the words.

        Raises:
            InputError: An unknown mode or dtype, or a budget below 0.
        """
        if self.mode not in MODES:
            raise InputError(f"cache {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(f"cache dtype {self.dtype!r}: choose auto or one of {', '.join(DTYPES)}")
        if self.budget is not None and self.budget < 0:
            raise InputError(f"cache budget {self.budget}: must not be negative")

    def wanted(
        self, model: PreTrainedModel, recipe: Recipe, settings: TrainingSettings, examples: Examples
    ) -> int:
        """The depth whose states a run takes from the cache; 0 if it runs the whole model.

        Only a recipe that trains nothing but the model's end has a frozen prefix. ``auto`` stores it where
        rows come more than once, or other recipes share the file, and the budget allows it.
        """
        count = len(find_blocks(model)[1])
        depth = frozen_depth(recipe, count)
        if self.mode == "off" or depth == 0:
            return 0
        if self.mode == "auto":
            again = (settings.steps or 0) * settings.batch_size > len(examples) or len(self.depths) > 1
            fits = self.budget is None or self.bytes(model, examples, depth) <= self.budget
            return depth if again and fits else 0
        return depth

    def described(self, model: PreTrainedModel, examples: Examples, depth: int) -> dict[str, Any] | None:
        """What a manifest says of the cache; None where none is used."""
        if depth == 0:
            return None
        return {"depth": depth, "dtype": self.dtype_of(model), "bytes": self.bytes(model, examples, depth)}

    def bytes(self, model: PreTrainedModel, examples: Examples, depth: int) -> int:
        """Bytes that a file for these rows takes."""
        width = model.config.get_text_config().hidden_size
        return prefix_bytes(examples, width, [*self.depths, depth], self.dtype_of(model))

    def dtype_of(self, model: PreTrainedModel) -> str:
        """How the states of a model are stored."""
        own = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        return own if self.dtype == "auto" else self.dtype

    def states(
        self,
        model: PreTrainedModel,
        examples: Examples,
        depth: int,
        *,
        batch_size: int,
        label: str,
        fingerprint: str | None = None,
    ) -> Prefix:
        """The stored states of some rows, computed if they are not there yet.

        ``fingerprint`` is the model's, if it is known already.

        Before they are, their size is said in one line on stderr, terminal or not: they take disk space.

        Raises:
            InputError: See :func:`preln.heal.prefix.states.build_prefix`.
        """
        identity = {"model": fingerprint or model_fingerprint(model), "data": examples.fingerprint()}
        key = (identity["model"], identity["data"])
        if key not in self._held or depth not in self._held[key].depths:
            name = f"{label}-{key[1][:12]}"
            self._announce(model, examples, depth, name)
            began = time.perf_counter()
            training = model.training
            model.eval()
            try:
                self._held[key] = build_prefix(
                    model,
                    examples,
                    sorted({*self.depths, depth}),
                    Path(self.folder),
                    identity=identity,
                    dtype=self.dtype_of(model),
                    batch_size=batch_size,
                    budget=self.budget,
                    label=name,
                )
            finally:
                model.train(training)
            self.seconds += time.perf_counter() - began
        return self._held[key]

    def _announce(self, model: PreTrainedModel, examples: Examples, depth: int, name: str) -> None:
        """Say how much is about to be stored, unless it is there already or will be refused."""
        size, folder = self.bytes(model, examples, depth), Path(self.folder)
        there = all((folder / f"{name}{ending}").exists() for ending in (".safetensors", ".json"))
        if there or (self.budget is not None and size > self.budget):
            return
        count, tokens = len({*self.depths, depth}), examples.input_ids.numel()
        depths = "1 depth" if count == 1 else f"{count} depths"
        note(f"heal: stored states: {depths}, {tokens} tokens, {_readable(size)} in {folder}")


def _readable(size: int) -> str:
    """A number of bytes for people.

    >>> _readable(37_700_000)
    '37.7 MB'
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def frozen_depth(recipe: Recipe, count: int) -> int:
    """Number of blocks in front of everything that a recipe trains; 0 unless it trains the end alone."""
    alone = recipe.kind == "tail" and recipe.objective == "next_token"
    return max(0, count - recipe.blocks) if alone else 0
