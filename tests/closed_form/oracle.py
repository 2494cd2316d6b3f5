"""Slow oracle: the definition's Jacobian and its largest singular value in 80-digit arithmetic."""

from __future__ import annotations

import mpmath


def sigma(layer: str, x: list[float], gain: list[float], eps: float) -> float:
    """Largest singular value of diag(gain) dy/dx, from the partial derivatives written out by hand."""
    with mpmath.workdps(80 + _spread(x)):
        x = [mpmath.mpf(float(v)) for v in x]
        gain = [mpmath.mpf(float(v)) for v in gain]
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
        return float(mpmath.sqrt(max(top, mpmath.mpf(0))))


def _spread(x: list[float]) -> int:
    """Extra digits so that huge entries do not swallow eps."""
    largest = max((abs(float(v)) for v in x), default=0.0)
    return int(4 * max(0.0, mpmath.log10(largest))) if largest > 0 else 0
