"""Ctrl-C: once ends the work in order, twice ends the process at once; nothing half-written stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from preln.base.staging import abandon

_AGAIN_S = 0.05
_LINE = b"\npreln: interrupted twice: stopped at once, finished work is kept, the same command goes on\n"


def taken(code: int, pressed: list[bool]) -> None:
    """Take over this process's interrupts until it ends.

    The first raises ``KeyboardInterrupt``, as Python does. Raised where no exception can travel (a finaliser,
    a callback of C code), which Python would print and forget, it is raised again a moment later. The second
    removes what the process was writing and ends it with ``code`` and one line, also while it shuts down.

    Args:
        code: Exit code of a process that was interrupted twice.
        pressed: An empty list that gets an entry for every interrupt. It stays empty where interrupts are
            ignored or belong to somebody else, who is left to them.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        pressed.append(True)
        if len(pressed) > 1:
            abandon()
            os.write(2, _LINE)
            os._exit(code)
        raise KeyboardInterrupt

    former = sys.unraisablehook

    def on_unraisable(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            former(unraisable)
            return
        pressed.clear()  # it was not heard
        # a signal, since nothing less ends a call that waits
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main.ident, signal.SIGINT))
        again.daemon = True
        again.start()

    signal.signal(signal.SIGINT, on_signal)
    sys.unraisablehook = on_unraisable


def hushed() -> None:
    """The interrupt was heard and is about to be told: what comes until :func:`left` says nothing more."""
    if _is_ours():
        signal.signal(signal.SIGINT, lambda _number, _frame: None)


def left(code: int) -> None:
    """The work is done and the process ends: an interrupt from here on ends it at once, with its own code."""
    if _is_ours():
        signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(code))


def _is_ours() -> bool:
    return getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__
