"""Replacements beside removal: plain functions from (model, tokens, drop) to (new plain model, plan)."""

from __future__ import annotations

from preln.prune.replace.elder import elder, elder_weights
from preln.prune.replace.grasp import grasp
from preln.prune.replace.laco import laco
from preln.prune.replace.mka import mka
from preln.prune.replace.registry import (
    REPLACEMENTS,
    read_settings,
    repeat_plan,
    replace_blocks,
    replacement,
    settings_of,
)
from preln.prune.replace.sliding_merge import sliding_merge
from preln.prune.replace.streamline import streamline

__all__ = [
    "REPLACEMENTS",
    "elder",
    "elder_weights",
    "grasp",
    "laco",
    "mka",
    "read_settings",
    "repeat_plan",
    "replace_blocks",
    "replacement",
    "settings_of",
    "sliding_merge",
    "streamline",
]
