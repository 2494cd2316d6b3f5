"""Hypothesis strategies that build norm layers and inputs, nasty ones included, without filtering."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from preln.base.errors import InputError
from preln.testing.layers import KINDS, NormLayer

_ENTRY = st.floats(-100.0, 100.0, width=32)


def _tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _dimension(d: int | None, max_d: int) -> st.SearchStrategy[int]:
    if (d is not None and d < 1) or max_d < 1:
        raise InputError(f"dimension {d if d is not None else max_d}: it must be at least 1")
    return (
        st.just(d)
        if d is not None
        else st.one_of(st.sampled_from([k for k in (1, 2, 3) if k <= max_d]), st.integers(1, max_d))
    )


@st.composite
def norm_inputs(draw, d: int | None = None, *, max_d: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a `[d]` vector: ordinary, zero, constant, one-hot, huge (1e30), subnormal, tiny or shifted.

    Args:
        draw: given by Hypothesis.
        d: the dimension; drawn, with a liking for 1, 2 and 3, if None.
        max_d: the largest dimension drawn.
        dtype: of the vector.
    """
    n = draw(_dimension(d, max_d))
    kind = draw(
        st.sampled_from(["ordinary", "zero", "constant", "one-hot", "huge", "subnormal", "tiny", "offset"])
    )
    entries = draw(st.lists(_ENTRY, min_size=n, max_size=n))
    if kind == "zero":
        entries = [0.0] * n
    elif kind == "constant":
        entries = [entries[0]] * n
    elif kind == "one-hot":
        place = draw(st.integers(0, n - 1))
        entries = [entries[0] if k == place else 0.0 for k in range(n)]
    elif kind == "subnormal":
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        entries = [round(v) * smallest for v in entries]
    scale = {"huge": 1e28, "tiny": 1e-8}.get(kind, 1.0)
    shift = draw(_ENTRY) * 10 if kind == "offset" else 0.0
    return _tensor([v * scale + shift for v in entries], dtype)


@st.composite
def gains(draw, d: int | None = None, *, max_d: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a `[d]` gain: ordinary, with ties, zeros, negatives, all equal, one-hot, or of many sizes.

    Args:
        draw: given by Hypothesis.
        d: the dimension; drawn if None.
        max_d: the largest dimension drawn.
        dtype: of the gain.
    """
    n = draw(_dimension(d, max_d))
    kind = draw(st.sampled_from(["ordinary", "ties", "zeros", "equal", "one-hot", "wide"]))
    pools = {
        "ties": st.sampled_from([-2.0, -1.0, 1.0, 2.0]),
        "zeros": st.sampled_from([0.0, 1.0, -0.5]),
        "wide": st.integers(-30, 30).map(lambda k: 2.0**k),
    }
    entries = draw(st.lists(pools.get(kind, st.floats(-4.0, 4.0, width=32)), min_size=n, max_size=n))
    if kind == "equal":
        entries = [entries[0]] * n
    elif kind == "one-hot":
        place = draw(st.integers(0, n - 1))
        entries = [entries[0] if k == place else 0.0 for k in range(n)]
    return _tensor(entries, dtype)


def eps_values() -> st.SearchStrategy[float]:
    """Draw an eps above 0: those that models use, and any between 1e-12 and 10."""
    return st.one_of(st.sampled_from([1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1.0]), st.floats(1e-12, 10.0))


@st.composite
def norm_layers(
    draw,
    d: int | None = None,
    *,
    kinds: tuple[str, ...] = KINDS,
    max_d: int = 16,
    dtype: torch.dtype = torch.float64,
) -> NormLayer:
    """Draw a `NormLayer`, with or without gain.

    Args:
        draw: given by Hypothesis.
        d: the dimension of the gain; drawn if None.
        kinds: which layers to draw from.
        max_d: the largest dimension drawn.
        dtype: of the gain.
    """
    n = draw(_dimension(d, max_d))
    weight = draw(st.one_of(st.none(), gains(n, dtype=dtype)))
    return NormLayer(draw(st.sampled_from(list(kinds))), draw(eps_values()), weight)
