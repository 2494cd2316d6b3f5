"""Where tokens, training rows and benchmark rows come from: sources, windows, fingerprints."""

from __future__ import annotations

from preln.data.benchmarks import BENCHMARKS, Located, locate
from preln.data.gold import GOLD, GoldAnswer, load_gold
from preln.data.rows import checked_row, load_rows
from preln.data.sources import describe, documents, list_sources
from preln.data.tokens import document_split, fingerprint, load_tokens

__all__ = [
    "BENCHMARKS",
    "GOLD",
    "GoldAnswer",
    "Located",
    "checked_row",
    "describe",
    "document_split",
    "documents",
    "fingerprint",
    "list_sources",
    "load_gold",
    "load_rows",
    "load_tokens",
    "locate",
]
