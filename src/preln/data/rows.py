"""Instruction and text rows of a source: recognised, checked, split by content, in an order by hash."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from preln.base.errors import InputError, require
from preln.base.progress import track
from preln.data.files import _lines, row_text
from preln.data.hub import hub_disabled, hub_reachable, quiet_datasets
from preln.data.sources import documents, source_kind
from preln.data.tokens import Split, document_split

HUB_ROWS = 100_000  # rows streamed from a hub data set: all of the usual instruction sets, not all of C4
BATCH = 512  # rows of a Parquet file in memory at once

_JSON = (".jsonl", ".jsonl.gz")
_FILES = (*_JSON, ".parquet")
# what names of files and folders call the rows that training must not see
_HELD_OUT = {"test", "tests", "validation", "valid", "val", "dev", "eval", "evaluation"}
# in the order in which they are looked for
_FORMS = (("messages",), ("instruction", "output"), ("prompt", "completion"), ("text",))
_MEND = "give messages, or instruction and output, or prompt and completion, or text"


def load_rows(
    src: str | os.PathLike[str], *, split: Split = "train", limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of a source that belong to a split, ordered by ``sha256(seed, content)``.

    A row keeps the columns of the first form that it has, and loses all others:

    * chat: ``messages``, a list of ``{"role", "content"}`` with at least one from the assistant;
    * Alpaca: ``instruction``, ``output`` and perhaps ``input``;
    * ``prompt`` and ``completion``;
    * ``text``.

    About one row in ten is validation, by the hash of its content alone, with the rule of
    :func:`preln.data.document_split`; texts and Alpaca rows fall on the side on which
    :func:`preln.data.load_tokens` puts them too. Neither the order of rows in the source nor a generator's
    version plays a part, and ``limit`` takes the first of the same order. Blank lines and blank texts are
    left out. The rows are streamed: with a limit no more than that many are held.

    Args:
        src: A ``.jsonl[.gz]`` or ``.parquet`` file; a folder of such (files named after another split, as
            ``test.jsonl``, are left out); a hub data set id, of whose training split the first ``HUB_ROWS``
            rows are read; or any other source of :func:`preln.data.documents`, whose documents become texts.
        split: ``"train"`` or ``"validation"``.
        limit: Most rows to return; all if None.
        seed: Fixes the order.

    Raises:
        InputError: The source is missing, unreadable, damaged or empty; a row has none of the forms or a
            wrong type (the line names file, line and column); no row belongs to the split.
    """
    if split not in ("train", "validation"):
        raise InputError(f"split must be 'train' or 'validation', not {split!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number of at least 1, not {limit!r}")
    # a heap whose first entry is the last in the order; numbers, since bytes have no negative
    kept: list[tuple[int, int, dict[str, Any]]] = []
    read = 0
    for where, raw in track(_raw_rows(src), label="rows"):
        row = checked_row(raw, where)
        if not str(row.get("text", "filled")).strip():
            continue
        read += 1
        content = _content(row, where)
        if document_split(content) != split:
            continue
        digest = hashlib.sha256(f"{seed}:{content}".encode()).digest()
        entry = (-int.from_bytes(digest, "big"), -read, row)
        if limit is None:
            kept.append(entry)
        elif len(kept) < limit:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
    if not read:
        raise InputError(f"{os.fspath(src)}: holds no rows: name a source with rows in it")
    if not kept:
        raise InputError(
            f"{os.fspath(src)}: none of its {read} rows belongs to the {split} split: name a larger source"
        )
    return [row for _, _, row in sorted(kept, key=lambda entry: entry[:2], reverse=True)]


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """A copy of a row with the columns of its form alone, after a look at their types.

    Args:
        row: What should be a dictionary.
        where: What the row is called in an error.

    Raises:
        InputError: No dictionary, none of the forms, or a column of a wrong type.

    >>> checked_row({"instruction": "Add.", "input": None, "output": "3", "id": 7}, "row 0")
    {'instruction': 'Add.', 'input': '', 'output': '3'}
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: is {type(row).__name__}, not a dictionary: {_MEND}")
    given = {name for name, value in row.items() if value is not None}
    # the first form that is complete, or else the first that was begun
    form = next((f for f in _FORMS if given.issuperset(f)), None) or next(
        (f for f in _FORMS if not given.isdisjoint(f)), None
    )
    if form is None:
        names = ", ".join(sorted(map(str, row))) or "nothing"
        raise InputError(
            f"{where}: has no text under 'instruction' and 'output', 'prompt' and 'completion', or 'text', "
            f"and no 'messages' (it has: {names}): rename its columns"
        )
    if form == ("messages",):
        return {"messages": _checked_messages(row["messages"], where)}
    found = {column: _checked_text(row.get(column), column, where) for column in form}
    if form == ("instruction", "output"):
        extra = "" if row.get("input") is None else _checked_text(row["input"], "input", where)
        return {"instruction": found["instruction"], "input": extra, "output": found["output"]}
    return found


def _checked_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    what = "it is missing" if value is None else f"it holds {type(value).__name__}"
    raise InputError(f"{where}: has no text under {column!r} ({what}): give a string there")


def _checked_messages(value: Any, where: str) -> list[dict[str, str]]:
    """Messages less whatever else they carry."""
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"{where}: 'messages' is no list of messages: give [{{'role': …, 'content': …}}, …]")
    found = []
    for index, message in enumerate(value):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise InputError(
                    f"{where}: message {index} of 'messages' has no text under {key!r}: give a string"
                )
        found.append({"role": message["role"], "content": message["content"]})
    if all(message["role"] != "assistant" for message in found):
        raise InputError(f"{where}: 'messages' has no turn of the role 'assistant': add one, or drop the row")
    return found


def _content(row: dict[str, Any], where: str) -> str:
    """All that a row says, as one string; for a text or an Alpaca row, what ``load_tokens`` reads."""
    content = row_text(row)
    if content is None:
        content = json.dumps(row, ensure_ascii=False, sort_keys=True)
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a surrogate pair: mend the escape") from error
    return content


def _raw_rows(src: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Every row with the name of its place."""
    name = os.fspath(src)
    if name.lower().endswith(_FILES):
        yield from _file_rows(Path(name))
        return
    kind = source_kind(src)
    if kind == "hub" or (kind == "folder" and not Path(name).is_dir()):
        yield from _dataset_rows(name, kind)
    elif kind == "folder":
        for path in _folder_files(Path(name)):
            yield from _file_rows(path)
    else:
        for index, text in enumerate(documents(src), start=1):
            yield f"{name}: document {index}", {"text": text}


def _folder_files(folder: Path) -> list[Path]:
    """The row files under a folder, less those that are named after a split that is not for training."""
    try:
        found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(_FILES))
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}): name another folder"
        ) from error
    kinds = ", ".join(_FILES)
    if not found:
        raise InputError(f"{folder}: holds no {kinds} file: name a folder with rows in it")

    def held_out(path: Path) -> bool:
        return bool(_HELD_OUT & set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())))

    kept = [path for path in found if not held_out(path)]
    if not kept:
        raise InputError(f"{folder}: its files are all named after another split than train: name the file")
    return kept


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    yield from _parquet_rows(path) if path.name.lower().endswith(".parquet") else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON-lines file."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}): mend or remove the line") from error
        yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, of which only the columns that count are decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {"input", *(column for form in _FORMS for column in form)}
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in known] or names
            for batch in table.iter_batches(batch_size=BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable Parquet file ({reason}): fetch it again") from error


def _dataset_rows(src: str, kind: str) -> Iterator[tuple[str, Any]]:
    """The training rows of a data set that the ``datasets`` package finds, streamed."""
    if kind == "hub" and not hub_disabled() and not hub_reachable():
        raise InputError(f"{src}: no such file, and the model hub cannot be reached: name a file or folder")
    datasets = require("datasets", extra="eval")
    name, _, config = src.partition(":")
    # without the network only a copy in the user's cache can be read, and the cache cannot be streamed
    streaming = not (kind == "hub" and hub_disabled())
    try:
        with quiet_datasets():
            loaded = datasets.load_dataset(name, config or None, split="train", streaming=streaming)
            rows = islice(iter(loaded), HUB_ROWS if kind == "hub" else None)
            for number, row in enumerate(rows, start=1):
                yield f"{src}: row {number}", row
    except Exception as error:  # the package raises many unrelated types, from ValueError to its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = " (the hub is switched off by HF_HUB_OFFLINE)" if kind == "hub" and hub_disabled() else ""
        raise InputError(f"{src}: the data set cannot be loaded{offline}: {reason}") from error
