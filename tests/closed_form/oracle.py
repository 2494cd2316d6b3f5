"""Slow oracle: the definition's Jacobian and its largest singular value in 80-digit arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath

STEP = mpmath.mpf(10) ** -25
DIGITS = 80


def sigma(layer: str, x: Sequence[float], gain: Sequence[float], eps: float) -> float:
    """Largest singular value of diag(gain) dy/dx, from the partial derivatives written out by hand."""
    with mpmath.workdps(DIGITS + _spread(x)):
        return float(_sigma(layer, _exact(x), _exact(gain), eps))


def slopes(
    layer: str,
    x: Sequence[float],
    gain: Sequence[float],
    eps: float,
    along_x: Sequence[float],
    along_gain: Sequence[float],
) -> tuple[float, float]:
    """Directional derivative of sigma from the left and from the right, by differences at a step of 1e-25."""
    with mpmath.workdps(DIGITS + _spread(x)):
        here, gain, dx, dgain = _exact(x), _exact(gain), _exact(along_x), _exact(along_gain)
        left, middle, right = (
            _sigma(
                layer,
                [v + k * STEP * w for v, w in zip(here, dx, strict=True)],
                [v + k * STEP * w for v, w in zip(gain, dgain, strict=True)],
                eps,
            )
            for k in (-1, 0, 1)
        )
        return float((middle - left) / STEP), float((right - middle) / STEP)


def _exact(values: Sequence[float]) -> list[mpmath.mpf]:
    return [mpmath.mpf(float(v)) for v in values]


def _sigma(layer: str, x: list[mpmath.mpf], gain: list[mpmath.mpf], eps: float) -> mpmath.mpf:
    eps = mpmath.mpf(float(eps))
    d = len(x)
    if layer == "layer_norm":
        mean = mpmath.fsum(x) / d
        x = [v - mean for v in x]
    square = mpmath.fsum(v * v for v in x) / d
    rms = mpmath.sqrt(square)
    s = rms + eps if layer == "rms_norm_outside" else mpmath.sqrt(square + eps)
    # ds/dx_j, before centring of the columns
    slope = [0 if square == 0 else v / (d * (rms if layer == "rms_norm_outside" else s)) for v in x]
    rows = mpmath.matrix(d, d)
    for a in range(d):
        for b in range(d):
            direct = (1 if a == b else 0) - (mpmath.mpf(1) / d if layer == "layer_norm" else 0)
            rows[a, b] = gain[a] * (direct / s - x[a] * slope[b] / s**2)
    gram = rows * rows.T
    top = max(mpmath.eigsy(gram, eigvals_only=True)) if d > 1 else gram[0, 0]
    return mpmath.sqrt(max(top, mpmath.mpf(0)))


def _spread(x: Sequence[float]) -> int:
    """Extra digits so that huge entries do not swallow eps, nor eps tiny entries."""
    largest = max((abs(float(v)) for v in x), default=0.0)
    return int(4 * abs(mpmath.log10(largest))) if largest > 0 else 0
