"""Training rows: token ids, what of them is supervised, and the order in which they come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.data import fingerprint
from preln.heal.rows.encode import IGNORED, Encoded, encode_rows


@dataclass(frozen=True)
class Examples:
    """Windows of equal length, of one row each or, packed, of several.

    Attributes:
        input_ids: ``[n, T]`` token ids.
        labels: ``[n, T]``, the ids that count in the loss, ``IGNORED`` elsewhere; the label at t is predicted
            from the tokens before t.
        attention_mask: ``[n, T]``, 1 on tokens and 0 on padding; None where there is no padding.
        documents: ``[n, T]``, of packed windows: the row within the window, 0, 1, 2, ..., that a token
            belongs to, -1 on padding. Each is one run. Attention must not cross them
            (:func:`preln.heal.rows.packing.forward_inputs`). None where every window is one row.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return int(self.input_ids.shape[0])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Examples:
        fields = (self.input_ids, self.labels, self.attention_mask, self.documents)
        return Examples(*(None if field is None else change(field) for field in fields))  # pyright: ignore

    def take(self, rows: Sequence[int] | Tensor) -> Examples:
        """The windows of these indices, in their order, as int64: stored they may be narrower."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return self._each(lambda field: field[index].long())

    def to(self, device: torch.device) -> Examples:
        """The same windows on a device."""
        return self._each(lambda field: field.to(device))

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    @property
    def supervised(self) -> int:
        """Tokens whose prediction counts in the loss; the first of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def fingerprint(self) -> str:
        """SHA-256 over the tokens and, where they say more, the labels, the mask and the documents."""
        first = fingerprint(self.input_ids)
        plain = self.attention_mask is None and self.documents is None
        if plain and torch.equal(self.labels, self.input_ids):
            return first
        parts = [first, fingerprint(self.labels)]
        if self.attention_mask is not None:
            parts.append(fingerprint(self.attention_mask))
        if self.documents is not None:
            parts.append(f"documents {fingerprint(self.documents)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def as_examples(
    source: Examples | Tensor | Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    length: int = 256,
    vocabulary: int | None = None,
    name: str = "training data",
    packed: bool = True,
    template: str = "auto",
    supervise: str = "response",
) -> Examples:
    """Windows from token ids ``[n, T]``, or from dictionaries of the forms of :func:`preln.data.load_rows`.

    Token ids and ``text`` are supervised everywhere, a conversation (``messages``; ``prompt`` and
    ``completion``; ``instruction``, ``output`` and perhaps ``input``) on what the assistant writes. Long
    texts are cut into consecutive rows; a conversation beyond ``length`` is cut off at the end. Short rows
    share a window, between which attention does not pass, or are padded on the right.

    Args:
        source: The data.
        tokenizer: Needed for dictionaries.
        length: Most tokens a window made from dictionaries holds.
        vocabulary: Number of embeddings; ids at or above it are refused.
        name: What the data are called in an error.
        packed: Whether rows of dictionaries share windows. Token ids stay as they are.
        template: ``"auto"``, ``"alpaca"`` or ``"chat"``; see :func:`preln.heal.rows.encode.encode_rows`.
        supervise: ``"response"`` or ``"all"``.

    Raises:
        InputError: Empty data, wrong shape or type, a missing column, ids outside the vocabulary, or no
            supervised token.
    """
    from preln.heal.rows.packing import pack, padded  # which makes Examples

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
        rows = _encoded(list(source), tokenizer, length, name, template=template, supervise=supervise)
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        lay_out = pack if packed else padded
        examples = lay_out(rows, length, pad=pad, name=name, narrow=True)
    low, high = int(examples.input_ids.min()), int(examples.input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise InputError(
            f"{name}: token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}: "
            "use the model's own tokenizer"
        )
    if examples.supervised == 0:
        raise InputError(f"{name}: holds no token to predict: give longer rows")
    return examples


def _encoded(
    rows: list[Mapping[str, Any]], tokenizer: Any, length: int, name: str, **options: str
) -> Iterator[Encoded]:
    """Rows of dictionaries as tokens, one by one."""
    if not rows:
        raise InputError(f"{name}: holds no rows: give at least one")
    if tokenizer is None:
        raise InputError(f"{name}: rows of text need the model's tokenizer: pass tokenizer=")
    if length < 2:
        raise InputError(f"length={length}: must be at least 2")
    return encode_rows(rows, tokenizer, name=name, **options)


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
