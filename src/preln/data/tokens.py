"""From a text source to a batch of token windows, the same on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.base.progress import track
from preln.data.sources import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation"]

VALIDATION_SHARE = 10  # one document in ten
CHUNK = 64  # documents tokenised in one call, where fast tokenizers use their threads
SPARE_WINDOWS = 256  # windows to draw from beyond twice those asked for


def load_tokens(
    src: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 8,
    length: int = 128,
    seed: int = 0,
    split: Split = "train",
) -> Tensor:
    """Token windows of a source: ``[sequences, length]``, no padding, fixed by ``seed``.

    Documents are ordered by a hash of the seed and their text, tokenised, each ended by the tokenizer's eos
    (and begun by its bos where the tokenizer itself adds one), and their stream is cut into windows of
    ``length`` that do not overlap. The windows returned are drawn without replacement from about twice as
    many as asked for, or from all where there are fewer. Neither the order of documents in the source nor a
    random generator's version plays a part.

    A document belongs to the validation split by the hash of its text alone, about one in ten, so the two
    splits never share a document, whatever the seed.

    Args:
        src: ``"docstrings"``, a ``.jsonl[.gz]`` or ``.txt[.gz]`` path, a dataset folder, or a hub id.
        tokenizer: A transformers tokenizer; only its ids are used, not its truncation or padding.
        sequences: Number of windows, n.
        length: Tokens in a window, T.
        seed: Fixes which windows are drawn.
        split: ``"train"`` or ``"validation"``.

    Returns:
        LongTensor ``[sequences, length]`` on the CPU.

    Raises:
        InputError: A count is below 1, the split is unknown, the source is missing, unreadable or empty,
            the tokenizer has no separator, or the text holds fewer windows than asked for.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    if split not in ("train", "validation"):
        raise InputError(f"split must be 'train' or 'validation', not {split!r}")
    texts = [text for text in documents(src) if document_split(text) == split]
    texts.sort(key=lambda text: _rank(seed, text))
    pool = _windows(texts, tokenizer, length=length, wanted=2 * sequences + SPARE_WINDOWS)
    if len(pool) < sequences:
        raise InputError(
            f"{os.fspath(src)}: its {split} split holds {len(pool)} windows of {length} tokens, "
            f"not {sequences}: ask for fewer or shorter ones, or name a larger source"
        )
    drawn = sorted(range(len(pool)), key=lambda index: _rank(seed, f"window {index}"))[:sequences]
    return torch.tensor([pool[index] for index in drawn], dtype=torch.long)


def document_split(text: str) -> Split:
    """The split that a document belongs to, by the SHA-256 of its text alone.

    >>> sorted({document_split(str(n)) for n in range(100)})
    ['train', 'validation']
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0 else "train"


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 over the shape and the ids: equal for equal batches, on every machine.

    The bytes hashed are the shape as decimal text, ``"8,128;"``, then the ids as little-endian int64.

    Args:
        tokens: Integer tensor of any shape.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: The tensor does not hold integers.

    >>> fingerprint(torch.tensor([[1, 2]])) == fingerprint(torch.tensor([[1, 2]], dtype=torch.int32))
    True
    >>> fingerprint(torch.tensor([[1, 2]])) == fingerprint(torch.tensor([[1], [2]]))
    False
    """
    if tokens.is_floating_point() or tokens.is_complex():
        raise InputError(f"tokens must be integer ids, not {tokens.dtype}")
    digest = hashlib.sha256((",".join(map(str, tokens.shape)) + ";").encode("ascii"))
    digest.update(tokens.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _rank(seed: int, text: str) -> bytes:
    """A key that orders things at random, by seed, without any generator."""
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, wanted: int
) -> list[list[int]]:
    """At most ``wanted`` consecutive windows of the documents' token stream, in its order."""
    before, after = _separators(tokenizer)
    windows: list[list[int]] = []
    rest: list[int] = []
    for chunk in track(_chunks(texts, CHUNK), label="tokens", total=-(-len(texts) // CHUNK)):
        # verbose=False: a document longer than the model's context is no mistake, it is cut just below
        encoded: Any = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            rest.extend((*before, *ids, *after))
        whole = len(rest) // length
        windows.extend(rest[i * length : (i + 1) * length] for i in range(whole))
        rest = rest[whole * length :]
        if len(windows) >= wanted:
            return windows[:wanted]
    return windows


def _separators(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Ids put before and after every document."""
    after = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if after is None:
        raise InputError("the tokenizer has no eos token to join documents with: set tokenizer.eos_token")
    bos = tokenizer.bos_token_id
    plain: list[int] = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = bos is not None and plain[:1] == [bos] and bare[:1] != [bos]
    before = [bos] if begins else []
    return before, [after]


def _chunks(texts: Sequence[str], size: int) -> Iterable[list[str]]:
    """Consecutive slices of ``size``."""
    return (list(texts[start : start + size]) for start in range(0, len(texts), size))
