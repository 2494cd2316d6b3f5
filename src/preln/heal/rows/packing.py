"""Rows laid out in windows: one in each, padded, or several, packed."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence

import torch

from preln.base.errors import InputError
from preln.heal.rows.encode import IGNORED, Encoded
from preln.heal.rows.examples import Examples
from preln.heal.rows.isolation import forward_inputs, isolates

__all__ = ["forward_inputs", "isolates", "pack", "padded", "plan_windows"]

Piece = tuple[Sequence[int], Sequence[int]]


def plan_windows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which rows share a window of ``length`` tokens, by best-fit decreasing (Johnson et al. 1974).

    The longest row that is left goes into the fullest window that has room for it. Rows of equal size come in
    their order, and of windows with equal room the one opened first is taken, so the outcome is a function of
    the sizes. A window lists its rows in their order; windows come in the order of their first rows. At most
    11/9 of the fewest possible, plus 4.

    Args:
        sizes: Tokens of each row, at least 1 and at most ``length``.
        length: Tokens of a window.

    Raises:
        InputError: A size is out of range.

    >>> plan_windows([2, 5, 3, 1], 6)
    [[0, 2], [1, 3]]
    """
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where a window has room for exactly r tokens more
    for row in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[row]
        if not 1 <= size <= length:
            raise InputError(f"row {row}: {size} tokens do not fit a window of {length}: cut it first")
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            window = heapq.heappop(by_room[room])
            if not by_room[room]:
                rooms ^= 1 << room
            windows[window].append(row)
        else:
            room, window = length, len(windows)
            windows.append([row])
        left = room - size
        heapq.heappush(by_room[left], window)
        if left:
            rooms |= 1 << left
    return sorted(sorted(window) for window in windows)


def pack(
    rows: Iterable[Encoded],
    length: int,
    *,
    pad: int = 0,
    name: str = "training data",
    narrow: bool = False,
) -> Examples:
    """Whole rows packed into windows of at most ``length`` tokens, padded on the right.

    Nothing is lost but what :meth:`preln.heal.rows.encode.Encoded.pieces` cuts. The first token of a row is
    not supervised: nothing of its own row comes before it. Where no window holds two rows, the outcome is
    that of :func:`padded`.

    ``narrow`` stores numbers in no more bytes than they need; :meth:`Examples.take` widens them again.

    Raises:
        InputError: No row has a supervised token.
    """
    pieces = _pieces(rows, length, name)
    windows = plan_windows([len(ids) for ids, _ in pieces], length)
    if len(windows) == len(pieces):
        return _laid_out([[piece] for piece in pieces], pad, narrow)
    shared = [[pieces[index] for index in window] for window in windows]
    examples = _laid_out(shared, pad, narrow)
    documents = torch.full_like(examples.labels, -1)
    for window, parts in enumerate(shared):
        start = 0
        for number, (ids, _) in enumerate(parts):
            documents[window, start : start + len(ids)] = number
            examples.labels[window, start] = IGNORED
            start += len(ids)
    return Examples(examples.input_ids, examples.labels, examples.attention_mask, documents)


def padded(
    rows: Iterable[Encoded],
    length: int,
    *,
    pad: int = 0,
    name: str = "training data",
    narrow: bool = False,
) -> Examples:
    """A window for every row, or for every piece of a text, padded on the right.

    Raises:
        InputError: No row has a supervised token.
    """
    return _laid_out([[piece] for piece in _pieces(rows, length, name)], pad, narrow)


def _pieces(rows: Iterable[Encoded], length: int, name: str) -> list[Piece]:
    """Pieces of all rows, four bytes a number: lists of whole numbers take ten times as much."""
    pieces: list[Piece] = [
        (array("i", ids), array("i", labels)) for row in rows for ids, labels in row.pieces(length)
    ]
    if not pieces:
        raise InputError(
            f"{name}: no row keeps a supervised token within length={length}: give a larger length"
        )
    return pieces


def _laid_out(windows: Sequence[Sequence[Piece]], pad: int, narrow: bool) -> Examples:
    """Pieces side by side, in windows as wide as the fullest."""
    width = max(sum(len(ids) for ids, _ in window) for window in windows)
    input_ids = torch.full((len(windows), width), pad, dtype=torch.int32 if narrow else torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    mask = torch.zeros_like(input_ids, dtype=torch.int8 if narrow else torch.long)
    for index, window in enumerate(windows):
        ids = [token for piece, _ in window for token in piece]
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.tensor([label for _, wanted in window for label in wanted])
        mask[index, : len(ids)] = 1
    return Examples(input_ids, labels, None if bool(mask.all()) else mask)
