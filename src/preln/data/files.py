"""Documents from JSON-lines and plain-text files, compressed or not, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preln.base.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
PARAGRAPHS = 1000  # characters; shorter paragraphs are joined with the next, or a document is a line


def is_text_path(src: str) -> bool:
    """Whether ``src`` is written like a file that :func:`file_documents` reads."""
    return src.lower().endswith(SUFFIXES)


def file_documents(path: Path) -> list[str]:
    """The documents of a ``.jsonl[.gz]`` or ``.txt[.gz]`` file, in the file's order.

    A JSON row is an object with a string ``text`` (or ``page``), or an instruction row (``instruction``,
    optional ``input``, ``output``), whose parts are joined by blank lines. Plain text is cut at blank lines,
    and consecutive paragraphs are joined until a document has ``PARAGRAPHS`` characters.

    Raises:
        InputError: The file is missing, not gzip though named so, not UTF-8, not JSON on some line, lacks
            the field, or holds no text.
    """
    name = path.name.lower()
    numbered = _lines(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        documents = [
            text for number, line in numbered if line.strip() for text in [_row_text(path, number, line)]
        ]
    else:
        documents = _paragraphs("".join(line for _, line in numbered))
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise InputError(f"{path}: holds no text: name a file with documents in it")
    return documents


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The file's lines with their numbers from 1, decoded strictly."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as source:
            for number, raw in enumerate(source, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number} is not UTF-8 ({error.reason}): convert the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip after line {number} ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error


def _row_text(path: Path, number: int, line: str) -> str:
    """The text of one JSON row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number} is not JSON ({error}): mend or remove the line") from error
    text = row_text(row)
    if text is None:
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(
            f"{path}: line {number} has no string field 'text', nor 'instruction' and 'output' "
            f"(it has: {keys}): rename the field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: line {number} holds half a surrogate pair: mend the escape") from error
    return text


def row_text(row: Any) -> str | None:
    r"""The text of a row with ``text`` (or ``page``), or of an instruction row; None when neither fits.

    >>> row_text({"instruction": "Add.", "input": "1 2", "output": "3"})
    'Add.\n\n1 2\n\n3'
    """
    if not isinstance(row, dict):
        return None
    for field in ("text", "page"):
        if isinstance(row.get(field), str):
            return row[field]
    parts = [row.get("instruction"), row.get("input") or "", row.get("output")]
    if not all(isinstance(part, str) for part in parts):
        return None
    return "\n\n".join(part for part in parts if part)


def _paragraphs(text: str) -> list[str]:
    """Blank-line separated paragraphs, gathered into documents of at least ``PARAGRAPHS`` characters."""
    documents: list[str] = []
    gathered: list[str] = []
    size = 0
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if not paragraph.strip():
            continue
        gathered.append(paragraph.strip("\n"))
        size += len(paragraph)
        if size >= PARAGRAPHS:
            documents.append("\n\n".join(gathered))
            gathered, size = [], 0
    if gathered:
        documents.append("\n\n".join(gathered))
    return documents
