"""Where tokens, training rows and benchmark rows come from: sources, windows, fingerprints."""

from __future__ import annotations

from preln.data.benchmarks import BENCHMARKS, Located, locate
from preln.data.rows import checked_row, load_rows
from preln.data.sources import describe, documents, list_sources
from preln.data.tokens import document_split, fingerprint, load_tokens

__all__ = [
    "BENCHMARKS",
    "Located",
    "checked_row",
    "describe",
    "document_split",
    "documents",
    "fingerprint",
    "list_sources",
    "load_rows",
    "load_tokens",
    "locate",
]
