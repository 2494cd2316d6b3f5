"""Progress on stderr, where a person is looking."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
    """Yield from ``iterable`` with a bar (rate, time left) when stderr is a terminal, silently otherwise.

    >>> list(track([1, 2], label="count"))
    [1, 2]
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    from tqdm import tqdm

    yield from tqdm(iterable, desc=label, total=total, file=sys.stderr, leave=False, delay=1.0)
