"""Where text comes from: the embedded documentation, files, dataset folders, and the hub."""

from __future__ import annotations

import hashlib
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

from preln.base.errors import InputError, require
from preln.base.files import hash_tree, sha256_file
from preln.base.packages import cache_dir
from preln.data.docstrings import docstring_documents, docstring_versions
from preln.data.files import SUFFIXES, file_documents, is_text_path, row_text
from preln.data.hub import hub_disabled, hub_reachable, quiet_datasets

HUB_ROWS = 20_000  # rows streamed from a hub data set: enough for any batch, without fetching all of C4

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_EXPLAIN = "name 'docstrings', a .jsonl[.gz] or .txt[.gz] file, a dataset folder, or a hub data set id"


def source_kind(src: str | os.PathLike[str]) -> str:
    """What ``src`` names: ``"docstrings"``, ``"file"``, ``"folder"`` or ``"hub"``.

    A configuration of a data set is named after a colon: ``wikitext:wikitext-2-raw-v1``.

    Raises:
        InputError: It is none of them.
    """
    name = os.fspath(src)
    if name == "docstrings":
        return "docstrings"
    if is_text_path(name):
        return "file"
    if Path(name.partition(":")[0]).is_dir() and name:
        return "folder"
    if Path(name).exists():
        raise InputError(f"{name}: not one of {', '.join(SUFFIXES)}: {_EXPLAIN}")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return "hub"
    raise InputError(f"{name!r}: no such file or folder: {_EXPLAIN}")


def documents(src: str | os.PathLike[str]) -> list[str]:
    """All documents of a source (of a hub data set: of its first ``HUB_ROWS`` training rows).

    Raises:
        InputError: The source is missing, unreadable, empty, or the hub cannot be reached.
    """
    kind = source_kind(src)
    if kind == "docstrings":
        return list(docstring_documents())
    if kind == "file":
        return file_documents(Path(src))
    return _dataset_documents(os.fspath(src), kind)


def _dataset_documents(src: str, kind: str) -> list[str]:
    """Texts of a data set that the ``datasets`` package reads."""
    if kind == "hub" and not hub_disabled() and not hub_reachable():
        raise InputError(f"{src}: no such file, and the model hub cannot be reached: {_EXPLAIN}")
    datasets = require("datasets", extra="eval")
    name, _, config = src.partition(":")
    # without the network only a copy in the user's cache can be read, and the cache cannot be streamed
    streaming = kind == "hub" and not hub_disabled()
    # the package keys its cache of a folder by name and card; two folders of one name must not be mixed up
    extra = {"cache_dir": str(cache_dir() / "datasets" / _tree_digest(name))} if kind == "folder" else {}
    try:
        with quiet_datasets():
            loaded = datasets.load_dataset(name, config or None, split="train", streaming=streaming, **extra)
            rows = list(islice(iter(loaded), HUB_ROWS if kind == "hub" else None))
    except Exception as error:  # the package raises many unrelated types, from ValueError to its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = " (the hub is switched off by HF_HUB_OFFLINE)" if kind == "hub" and hub_disabled() else ""
        raise InputError(f"{src}: the data set cannot be loaded{offline}: {reason}") from error
    texts = [row_text(row) for row in rows]
    missing = next((index for index, text in enumerate(texts) if text is None), None)
    if missing is not None:
        fields = ", ".join(rows[missing])
        raise InputError(f"{src}: row {missing + 1} has no string field 'text' (it has: {fields})")
    kept = [text for text in texts if text and text.strip()]
    if not kept:
        raise InputError(f"{src}: its training split holds no text: {_EXPLAIN}")
    return kept


def _tree_digest(folder: str) -> str:
    """A short hash of a folder's files and their contents."""
    return hashlib.sha256(repr(hash_tree(folder)).encode("utf-8")).hexdigest()[:16]


def describe(src: str | os.PathLike[str]) -> dict[str, Any]:
    """What to record about a source so that a reader can get the same text: JSON-ready.

    Files are described by their SHA-256, the embedded documentation by the versions that fix it. Only a
    file's name is kept, not its folder, which says nothing elsewhere.

    >>> describe("docstrings")["kind"]
    'docstrings'
    """
    kind = source_kind(src)
    if kind == "docstrings":
        return {"kind": kind, "source": "docstrings", "versions": docstring_versions()}
    path = Path(src)
    if kind == "file":
        if not path.is_file():
            raise InputError(f"{path}: no such file: check the path")
        return {"kind": kind, "source": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}
    if kind == "folder":
        folder, _, config = os.fspath(src).partition(":")
        return {"kind": kind, "source": Path(folder).name, "config": config, "files": hash_tree(folder)}
    return {"kind": kind, "source": os.fspath(src), "rows": HUB_ROWS, "split": "train"}


def list_sources() -> list[dict[str, str]]:
    """The kinds of text source that :func:`documents` reads, one row each, for people to read."""
    versions = ", ".join(f"{name} {number}" for name, number in docstring_versions().items())
    return [
        {"name": "docstrings", "from": f"installed packages ({versions})", "needs": "nothing"},
        {"name": "FILE.jsonl[.gz]", "from": "rows with `text`, or instruction rows", "needs": "nothing"},
        {"name": "FILE.txt[.gz]", "from": "paragraphs between blank lines", "needs": "nothing"},
        {"name": "FOLDER[:CONFIG]", "from": "a dataset folder, training split", "needs": "preln[eval]"},
        {"name": "OWNER/NAME[:CONFIG]", "from": "the hub, training split", "needs": "preln[eval], network"},
    ]
