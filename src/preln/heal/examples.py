"""Training rows: token ids, what of them is supervised, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.data import fingerprint

IGNORED = -100
# The template of Stanford Alpaca (Taori et al. 2023), which the published healing runs use.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Examples:
    """Rows of equal length.

    Attributes:
        input_ids: ``[n, T]`` token ids.
        labels: ``[n, T]``, the ids that count in the loss, ``IGNORED`` elsewhere; the label at t is predicted
            from the tokens before t.
        attention_mask: ``[n, T]``, 1 on tokens and 0 on padding; None where there is no padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.input_ids.shape[0])

    def take(self, rows: Sequence[int] | Tensor) -> Examples:
        """The rows of these indices, in their order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        mask = None if self.attention_mask is None else self.attention_mask[index]
        return Examples(self.input_ids[index], self.labels[index], mask)

    def to(self, device: torch.device) -> Examples:
        """The same rows on a device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Examples(self.input_ids.to(device), self.labels.to(device), mask)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    @property
    def supervised(self) -> int:
        """Tokens whose prediction counts in the loss; the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def fingerprint(self) -> str:
        """SHA-256 over the tokens and, where they say more, the labels and the mask."""
        first = fingerprint(self.input_ids)
        if self.attention_mask is None and torch.equal(self.labels, self.input_ids):
            return first
        parts = [first, fingerprint(self.labels)]
        if self.attention_mask is not None:
            parts.append(fingerprint(self.attention_mask))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def as_examples(
    source: Examples | Tensor | Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    length: int = 256,
    vocabulary: int | None = None,
    name: str = "training data",
) -> Examples:
    """Rows from token ids ``[n, T]``, from dictionaries with ``text``, or from Alpaca's columns.

    Token ids and ``text`` are supervised everywhere. A row with ``instruction``, ``output`` and perhaps
    ``input`` is put into Alpaca's template and supervised on the response and the end-of-sequence token only.
    Long texts are cut into consecutive rows; a response beyond ``length`` is cut off. Shorter rows are padded
    on the right.

    Args:
        source: The data.
        tokenizer: Needed for dictionaries.
        length: Most tokens a row made from a dictionary holds.
        vocabulary: Number of embeddings; ids at or above it are refused.
        name: What the data are called in an error.

    Raises:
        InputError: Empty data, wrong shape or type, a missing column, ids outside the vocabulary, or no
            supervised token.
    """
    if isinstance(source, Examples):
        examples = source
    elif isinstance(source, Tensor):
        if source.dim() != 2 or source.is_floating_point() or source.shape[0] < 1 or source.shape[1] < 2:
            raise InputError(
                f"{name}: token ids of shape {tuple(source.shape)} and type {source.dtype}: give integers "
                "[n, T] with n >= 1 and T >= 2"
            )
        ids = source.detach().to("cpu", torch.long)
        examples = Examples(ids, ids)
    else:
        examples = _from_rows(list(source), tokenizer, length, name)
    low, high = int(examples.input_ids.min()), int(examples.input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise InputError(
            f"{name}: token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}: "
            "use the model's own tokenizer"
        )
    if examples.supervised == 0:
        raise InputError(f"{name}: holds no token to predict: give longer rows")
    return examples


def _from_rows(rows: list[Mapping[str, Any]], tokenizer: Any, length: int, name: str) -> Examples:
    if not rows:
        raise InputError(f"{name}: holds no rows: give at least one")
    if tokenizer is None:
        raise InputError(f"{name}: rows of text need the model's tokenizer: pass tokenizer=")
    if length < 2:
        raise InputError(f"length={length}: must be at least 2")
    made: list[tuple[list[int], list[int]]] = []
    for index, row in enumerate(rows):
        made.extend(_encode(row, tokenizer, length, f"{name}, row {index}"))
    if not made:
        raise InputError(
            f"{name}: no row keeps a supervised token within length={length}: give a larger length"
        )
    width = max(len(ids) for ids, _ in made)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids = torch.full((len(made), width), pad, dtype=torch.long)
    labels = torch.full((len(made), width), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(made), width), dtype=torch.long)
    for index, (ids, wanted) in enumerate(made):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.tensor(wanted)
        mask[index, : len(ids)] = 1
    return Examples(input_ids, labels, None if bool(mask.all()) else mask)


def _encode(row: Any, tokenizer: Any, length: int, where: str) -> list[tuple[list[int], list[int]]]:
    """Rows of (ids, labels) from one dictionary; those without a supervised token are left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: is {type(row).__name__}: give a dictionary with text, or Alpaca's columns"
        )
    columns = ("text",) if "text" in row else ("instruction", "output")
    for column in columns:
        if not isinstance(row.get(column), str):
            raise InputError(f"{where}: has no text under {column!r}: give text, or instruction and output")
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"] + end
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        return [(window, window) for window in windows if len(window) > 1]
    template = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    prompt = tokenizer(template.format(instruction=row["instruction"], input=row.get("input")))["input_ids"]
    response = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + end
    ids = (prompt + response)[:length]
    labels = ([IGNORED] * len(prompt) + response)[:length]
    return [(ids, labels)] if any(label != IGNORED for label in labels[1:]) else []


def mixed_seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one use: other purposes and indices give unrelated streams."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batch_rows(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of batch number ``step``: a window of the stream of shuffled epochs.

    A function of its arguments alone: a run that continues at any step sees the rows it would have seen.

    >>> sorted(batch_rows(4, 2, 0, 0) + batch_rows(4, 2, 0, 1))
    [0, 1, 2, 3]
    """
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, rows)
        if epoch not in order:
            generator = torch.Generator().manual_seed(mixed_seed(seed, "order", epoch))
            order[epoch] = torch.randperm(rows, generator=generator).tolist()
        chosen.append(order[epoch][place])
    return chosen
