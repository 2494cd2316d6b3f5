"""Where tokens and benchmark rows come from: text sources, windows, fingerprints."""

from __future__ import annotations

from preln.data.benchmarks import BENCHMARKS, Located, locate
from preln.data.sources import describe, documents, list_sources
from preln.data.tokens import document_split, fingerprint, load_tokens

__all__ = [
    "BENCHMARKS",
    "Located",
    "describe",
    "document_split",
    "documents",
    "fingerprint",
    "list_sources",
    "load_tokens",
    "locate",
]
