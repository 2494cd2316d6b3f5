"""Runs lm-eval as a library: without its log lines, and without touching the caller's random state."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval and what it calls; errors still raise.

    Its progress bars stay where a person watches stderr, and vanish from log files. What it prints goes to
    stderr, since the last line of stdout may be a command's JSON.
    """
    from preln.data.hub import quiet_datasets

    logger = logging.getLogger("lm_eval")
    former = logger.level
    watched = sys.stderr.isatty()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(quiet_datasets())
            if not watched:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield
    finally:
        logger.setLevel(former)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run under fixed random states of Python, numpy and torch, and put the former ones back."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
