"""Blocks and halves of blocks, as a person writes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from preln.base.errors import InputError


def parse_layers(text: str) -> list[int | str]:
    """Blocks named as ``3,4,20-23``, and halves as ``5a`` (attention) and ``6m`` (MLP).

    Ranges are half-open, so that is 3, 4, 20, 21, 22; ``20-23a`` is the attention of these three.

    Raises:
        InputError: Anything but whole numbers and ascending ranges, or a block or half named twice.

    >>> parse_layers("3,4,20-23")
    [3, 4, 20, 21, 22]
    >>> parse_layers("5a,6m,1")
    [1, '5a', '6m']
    """
    found: list[tuple[int, str]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?([am]?)\s*", part, flags=re.ASCII)
        if match is None or max(len(match[1]), len(match[2] or "")) > 9:
            raise InputError(
                f"layers {text[:99]!r}: {part.strip()[:99]!r} is neither a block nor a range a-b, "
                "nor a half such as 5a or 6m"
            )
        start = int(match[1])
        stop = start + 1 if match[2] is None else int(match[2])
        if stop <= start:
            raise InputError(f"layers {text!r}: the range {part.strip()} is empty: a-b ends before b")
        if stop - start > 100_000:
            raise InputError(f"layers {text!r}: no model has {stop - start} blocks in a range")
        found.extend((block, match[3]) for block in range(start, stop))
    twice = sorted({entry for entry, times in Counter(found).items() if times > 1})
    if twice:
        block, half = twice[0]
        raise InputError(f"layers {text!r}: block {block}{half} is named twice: name each once")
    return [f"{block}{half}" if half else block for block, half in sorted(found)]


def sort_halves(layers: Iterable[int | str]) -> dict[str, list[int]]:
    """Whole blocks, and halves by kind, each in ascending order."""
    found: dict[str, list[int]] = {"drop": [], "drop_attention": [], "drop_mlp": []}
    for entry in layers:
        if isinstance(entry, str):
            if not re.fullmatch(r"\d+[am]", entry, flags=re.ASCII):
                raise InputError(f"block {entry!r}: name a half as 5a (attention) or 6m (MLP)")
            found["drop_attention" if entry[-1] == "a" else "drop_mlp"].append(int(entry[:-1]))
        else:
            found["drop"].append(entry)
    return found
