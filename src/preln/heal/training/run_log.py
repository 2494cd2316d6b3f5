"""Losses, learning rate and speed of a run, written while it goes on, for TensorBoard or trackio."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from preln.base.errors import InputError, require

LOGS = ("none", "tensorboard", "trackio")
Row = dict[str, Any]


class Writer(Protocol):
    """Takes named numbers of a step."""

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Store them."""

    def close(self) -> None:
        """Store what is still held back."""


@contextmanager
def run_log(
    kind: str,
    folder: str | os.PathLike[str] | None,
    *,
    name: str,
    main: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> Iterator[Callable[[Row], None] | None]:
    """What to call with every row of a history, so that it is logged too.

    Numbers: ``loss/train``, ``loss/validation``, ``learning_rate`` and ``tokens_per_second``, by step. A run
    that continues writes the steps behind its checkpoint once more: TensorBoard shows them in the place of
    the former ones, trackio beside them.

    Args:
        kind: ``none``, ``tensorboard`` (event files) or ``trackio`` (its local database).
        folder: Where event files go; for trackio, its last name is the project.
        name: Of the run, for trackio.
        main: Whether this process writes; others only pass rows on.
        on_row: Called with every row as well.

    Raises:
        InputError: An unknown kind, or no folder.
        MissingExtraError: The package is not installed.
    """
    check_log(kind, folder)
    if kind == "none" or not main or folder is None:
        yield on_row
        return
    writer: Writer = _TensorBoard(Path(folder)) if kind == "tensorboard" else _Trackio(Path(folder), name)
    former: Row = {"tokens": 0, "seconds": 0.0}

    def write(row: Row) -> None:
        nonlocal former
        numbers = {f"loss/{row['split']}": row["loss"], "learning_rate": row["learning_rate"]}
        tokens, seconds = row["tokens"] - former["tokens"], row["seconds"] - former["seconds"]
        if row["split"] == "train" and seconds > 0:
            numbers["tokens_per_second"] = tokens / seconds
        former = row
        writer.write(numbers, row["step"])
        if on_row is not None:
            on_row(row)

    try:
        yield write
    finally:
        writer.close()


def check_log(kind: str, folder: str | os.PathLike[str] | None) -> None:
    """Whether a run can be logged, asked before anything is trained.

    Raises:
        InputError: An unknown kind, or no folder.
        MissingExtraError: The package is not installed.
    """
    if kind not in LOGS:
        raise InputError(f"log={kind!r}: choose one of {', '.join(LOGS)}")
    if kind == "none":
        return
    if folder is None:
        raise InputError(f"log={kind}: name a folder for it by log_folder, or store the run by out")
    require(kind, extra="log")


class _TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, numbers: dict[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # a viewer then forgets what a run that was stopped wrote of this step and later ones
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Trackio:
    """A run in trackio's local database; what it says goes to stderr."""

    def __init__(self, folder: Path, name: str) -> None:
        self._module: Any = require("trackio", extra="log")
        with redirect_stdout(sys.stderr):
            self._module.init(project=folder.name, name=name, resume="allow")

    def write(self, numbers: dict[str, float], step: int) -> None:
        with redirect_stdout(sys.stderr):
            self._module.log(numbers, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()
