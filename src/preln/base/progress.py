"""Progress on stderr, where a person is looking."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_DELAY_S = 1.0  # what is over sooner needs no bar


def track(
    iterable: Iterable[T], *, label: str, total: int | None = None, state: Callable[[], str] | None = None
) -> Iterator[T]:
    """Yield from ``iterable`` with a bar (rate, time left) when stderr is a terminal, silently otherwise.

    Args:
        iterable: What to yield from.
        label: Stands in front of the bar.
        total: Number of items, where ``iterable`` has no length.
        state: Asked after every item for the words behind the bar, such as ``loss 2.31``; not asked where
            there is no bar.

    >>> list(track([1, 2], label="count"))
    [1, 2]
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    from tqdm import tqdm

    with tqdm(iterable, desc=label, total=total, file=sys.stderr, leave=False, delay=_DELAY_S) as bar:
        for item in bar:
            yield item
            if state is not None:
                bar.set_postfix_str(state(), refresh=False)


def note(line: str) -> None:
    """Print one line on stderr, terminal or not: what a log file should hold too."""
    print(line, file=sys.stderr, flush=True)


def end_bars() -> None:
    """End the line of every bar of this process that stands unfinished: what is said next has its own.

    For a program that is about to end, whose libraries draw bars of their own.
    """
    if "tqdm" not in sys.modules:
        return
    from tqdm import tqdm

    found = list(tqdm._instances)  # pyright: ignore[reportAttributeAccessIssue]
    for bar in sorted(found, key=lambda bar: -abs(getattr(bar, "pos", 0))):  # the lowest line first
        with contextlib.suppress(Exception):  # one that was just being made
            bar.close()
