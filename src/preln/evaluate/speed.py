"""How fast a model reads and writes, what it holds in memory, and what removing blocks can gain."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.base.memory import peak_bytes, reset_peak
from preln.base.stats import bootstrap_interval
from preln.evaluate.decoding import Decoding, check_room, device_of, evaluating
from preln.models import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PHASES = ("prefill", "decode")


@dataclass
class _Timed:
    """What a model spent at one batch size: seconds a round and phase, and bytes."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    block_shares: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    peak: dict[str, int] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)


def speed(
    model: PreTrainedModel,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 128,
    generate: int = 32,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Seconds and memory of prefill (the prompt, one pass) and decode (token by token with the cache).

    Each batch size runs once to warm up, where memory is taken, then ``repeats`` times. Prompts are random
    ids: what they say plays no part in how long a dense model takes. The model runs where it is.

    Args:
        model: A causal model of transformers that returns a key-value cache.
        batch_sizes: Sequences side by side.
        prompt: Tokens of each prompt.
        generate: Tokens written after it, one pass each.
        repeats: Timed rounds.
        seed: Draws the prompts.

    Returns:
        One row a phase and batch size: ``phase``, ``batch``, ``tokens`` (of the whole batch), ``seconds``
        (median), ``fastest``, ``lower_quartile``, ``upper_quartile``, ``tokens_per_second``, ``repeats``,
        ``parameter_bytes``, ``peak_bytes`` (on the CPU of the whole process), ``cache_bytes`` at the phase's
        end.

    Raises:
        InputError: A count below 1, more tokens than the model has positions, or a model without a cache.
    """
    _check(model, batch_sizes, prompt, generate, repeats)
    rows = []
    with evaluating(model):
        for batch in batch_sizes:
            ids = _prompts(model, batch, prompt, seed)
            timed = _Timed()
            _warm_up(model, ids, generate, timed)
            for _ in range(repeats):
                _round(model, ids, generate, timed)
            rows += _rows(model, timed, batch, prompt, generate)
    return pd.DataFrame(rows)


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt: int = 128,
    generate: int = 32,
    repeats: int = 5,
    removed: float | None = None,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time two models in turns, beside the limit that the removed blocks set (SPD-AMDAHL).

    The models take turns in one process (dense, pruned, dense, pruned, …), so that whatever else the machine
    does hits both, and the ratio is the median of the rounds' ratios. In rounds of their own, not among those
    compared, the dense model's blocks are timed from the first one's start to the last one's end: their share
    b of a pass. Removing a share p of equal blocks speeds up by at most ``1 / (1 - p b)``.

    Args:
        dense: The unpruned model.
        pruned: The other, on the same device.
        batch_sizes: Sequences side by side.
        prompt: Tokens of each prompt.
        generate: Tokens written after it.
        repeats: Rounds.
        removed: p; by default counted in whole blocks, which is wrong where parts of blocks were removed.
        seed: Draws the prompts and the bootstrap's resamples.

    Returns:
        The rows of :func:`speed` for both under ``model`` (``dense``, ``pruned``), and one row a phase and
        batch size: ``phase``, ``batch``, ``speedup`` (dense over pruned seconds) with ``low`` and ``high``
        (95 % bootstrap over rounds), ``removed`` (p), ``block_share`` (b, median), ``limit``, ``repeats``,
        and the ratios ``parameter_ratio`` and ``cache_ratio`` (pruned over dense bytes).

    Raises:
        InputError: As :func:`speed`; a different device; ``removed`` outside 0 to 1.
    """
    models = {"dense": dense, "pruned": pruned}
    for model in models.values():
        _check(model, batch_sizes, prompt, generate, repeats)
    if device_of(dense) != device_of(pruned):
        raise InputError(
            f"the models are on {device_of(dense)} and {device_of(pruned)}: put both on one device"
        )
    share = share_removed(dense, pruned) if removed is None else removed
    rows, ratios = [], []
    with evaluating(dense, pruned):
        for batch in batch_sizes:
            ids = _prompts(dense, batch, prompt, seed)
            timed = {name: _Timed() for name in models}
            for name, model in models.items():
                _warm_up(model, ids, generate, timed[name])
            for _ in range(repeats):
                for name, model in models.items():
                    _round(model, ids, generate, timed[name])
            for _ in range(repeats):
                _block_round(dense, ids, generate, timed["dense"])
            for name, model in models.items():
                rows += [{"model": name, **row} for row in _rows(model, timed[name], batch, prompt, generate)]
            ratios += [_ratio(phase, batch, timed, share, models, seed) for phase in PHASES]
    return pd.DataFrame(rows), pd.DataFrame(ratios)


def amdahl_limit(removed: float, block_share: float) -> float:
    """The largest speed-up from removing a share p of equal blocks that take a share b: ``1 / (1 - p b)``.

    Raises:
        InputError: A share outside 0 to 1, or both 1.

    >>> amdahl_limit(0.25, 0.8)
    1.25
    """
    for name, value in (("removed", removed), ("block_share", block_share)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} {value}: a share lies from 0 to 1")
    if removed * block_share == 1.0:
        raise InputError("removed and block_share are both 1: nothing would be left to run")
    return 1.0 / (1.0 - removed * block_share)


def share_removed(dense: PreTrainedModel, pruned: PreTrainedModel) -> float:
    """The share of whole blocks that are gone: ``1 - L_pruned / L_dense``.

    Raises:
        InputError: The pruned model has more blocks than the dense one.
    """
    before, after = len(find_blocks(dense)[1]), len(find_blocks(pruned)[1])
    if after > before:
        raise InputError(f"the pruned model has {after} blocks, the dense one {before}: swap the two")
    return 1.0 - after / before


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, a shared one once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that a key-value cache holds, whatever its class; one held twice counts once."""
    total, waiting = 0, [cache]
    seen: dict[int, Any] = {}  # holds what it has seen: the id of an object that is gone is given to another
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
            waiting += vars(value).values()
    return total


def _prompts(model: PreTrainedModel, batch: int, prompt: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(device_of(model))


def _synchronise() -> None:
    """Wait for what was handed to GPUs, so that the clock reads finished work."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(index)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def _now() -> float:
    _synchronise()
    return time.perf_counter()


def _decode(decoding: Decoding, logits: Tensor, steps: int) -> None:
    for _ in range(steps):
        logits = decoding.step(logits.argmax(-1))


def _warm_up(model: PreTrainedModel, ids: Tensor, steps: int, timed: _Timed) -> None:
    """One round that counts bytes, not seconds."""
    decoding = Decoding(model)
    reset_peak(decoding.device)
    logits = decoding.prefill(ids)
    timed.peak["prefill"], timed.cache["prefill"] = peak_bytes(decoding.device), cache_bytes(decoding.cache)
    reset_peak(decoding.device)
    _decode(decoding, logits, steps)
    timed.peak["decode"], timed.cache["decode"] = peak_bytes(decoding.device), cache_bytes(decoding.cache)


def _round(model: PreTrainedModel, ids: Tensor, steps: int, timed: _Timed) -> None:
    """Time one prompt and its continuation."""
    decoding = Decoding(model)
    start = _now()
    logits = decoding.prefill(ids)
    middle = _now()
    _decode(decoding, logits, steps)
    end = _now()
    timed.seconds["prefill"].append(middle - start)
    timed.seconds["decode"].append(end - middle)


def _block_round(model: PreTrainedModel, ids: Tensor, steps: int, timed: _Timed) -> None:
    """The share of each phase that passes inside the blocks, from the first's start to the last's end."""
    blocks = find_blocks(model)[1]
    marks: list[float] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda *_: marks.append(_now())),
        blocks[-1].register_forward_hook(lambda *_: marks.append(_now())),
    ]
    whole = _Timed()
    try:
        _round(model, ids, steps, whole)
    finally:
        for handle in handles:
            handle.remove()
    spans = np.diff(np.reshape(marks, (-1, 2)), axis=1)[:, 0]
    inside = {"prefill": float(spans[0]), "decode": float(spans[1:].sum())}
    for phase in PHASES:
        timed.block_shares[phase].append(inside[phase] / whole.seconds[phase][0])


def _rows(
    model: PreTrainedModel, timed: _Timed, batch: int, prompt: int, generate: int
) -> Iterable[dict[str, Any]]:
    """The table's rows at one batch size."""
    weights = parameter_bytes(model)
    for phase, each in zip(PHASES, (prompt, generate), strict=True):
        seconds = np.asarray(timed.seconds[phase])
        middle = float(np.median(seconds))
        yield {
            "phase": phase,
            "batch": batch,
            "tokens": batch * each,
            "seconds": middle,
            "fastest": float(seconds.min()),
            "lower_quartile": float(np.quantile(seconds, 0.25)),
            "upper_quartile": float(np.quantile(seconds, 0.75)),
            "tokens_per_second": batch * each / middle,
            "repeats": len(seconds),
            "parameter_bytes": weights,
            "peak_bytes": timed.peak[phase],
            "cache_bytes": timed.cache[phase],
        }


def _ratio(
    phase: str,
    batch: int,
    timed: Mapping[str, _Timed],
    removed: float,
    models: Mapping[str, PreTrainedModel],
    seed: int,
) -> dict[str, Any]:
    """One row of the comparison."""
    dense, pruned = timed["dense"], timed["pruned"]
    rounds = np.asarray(dense.seconds[phase]) / np.asarray(pruned.seconds[phase])
    low, high = bootstrap_interval(rounds, statistic=lambda x: float(np.median(x)), seed=seed)
    share = min(float(np.median(dense.block_shares[phase])), 1.0)
    held = dense.cache[phase]
    return {
        "phase": phase,
        "batch": batch,
        "speedup": float(np.median(rounds)),
        "low": low,
        "high": high,
        "removed": removed,
        "block_share": share,
        "limit": amdahl_limit(removed, share),
        "repeats": len(rounds),
        "parameter_ratio": parameter_bytes(models["pruned"]) / parameter_bytes(models["dense"]),
        "cache_ratio": pruned.cache[phase] / held if held else math.nan,
    }


def _check(
    model: PreTrainedModel, batch_sizes: Sequence[int], prompt: int, generate: int, repeats: int
) -> None:
    """Refuse counts that time nothing."""
    counts = {"prompt": prompt, "generate": generate, "repeats": repeats}
    for name, value in [*counts.items(), *(("batch size", size) for size in batch_sizes)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} {value!r}: use a whole number of at least 1")
    if not batch_sizes:
        raise InputError("no batch size to time: name at least one, such as 1")
    check_room(model, prompt + generate)
