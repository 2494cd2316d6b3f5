"""Time and peak memory of a call."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def seconds(call: Callable[[], Any], *, repeats: int = 1, warm: bool = True) -> float:
    """Return the shortest wall-clock time of some calls, in seconds.

    Args:
        call: what to time.
        repeats: how often.
        warm: whether to call once more, untimed, first.
    """
    if warm:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def interleaved(calls: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Return every call's wall-clock times, in seconds, one a round: all calls take turns.

    On a noisy machine the ratio of two calls is the median of the rounds' ratios.

    Args:
        calls: what to time, by name; each is called once more, untimed, first.
        repeats: number of rounds.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return spent


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return by how much torch's live memory on the processor rises during a call, at most.

    The profiler's trace holds every allocation and release in order; their running sum is the live memory.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    live = peak = 0
    # The sort is stable: events of the same moment stay in the order in which they were recorded.
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
