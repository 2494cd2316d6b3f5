"""Whether the model hub can be asked, found out once and quickly."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import lru_cache

PATIENCE = 4.0  # seconds; a hub that is reachable answers a HEAD well within it

_TRUE = {"1", "true", "yes", "on"}


def hub_disabled() -> bool:
    """Whether the user's environment forbids asking the hub (``HF_HUB_OFFLINE`` and its kin)."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in _TRUE for name in names)


def hub_reachable() -> bool:
    """Whether the hub may be asked and answers; asked at most once a process and address."""
    if hub_disabled():
        return False
    return _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


@lru_cache(maxsize=4)
def _answers(address: str) -> bool:
    """Whether ``address`` answers a HEAD request; any answer of a server but a refusal counts."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return bool(answer.status < 400)
    except (OSError, ValueError, urllib.error.URLError):
        return False


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep what the ``datasets`` package says off stderr: bars, drawn even into log files, and its log.

    What goes wrong comes as an exception, and is told in one line by the caller.
    """
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
