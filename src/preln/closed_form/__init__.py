"""The proved formulas as torch functions: Jacobians and singular values of RMSNorm and LayerNorm."""

from __future__ import annotations

from preln.closed_form.layer_norm import (
    layer_norm_jacobian,
    layer_norm_sigma,
    layer_norm_sigma_bounds,
    layer_norm_singular_values,
)
from preln.closed_form.rms_norm import (
    rms_norm_jacobian,
    rms_norm_sigma,
    rms_norm_sigma_bounds,
    rms_norm_singular_values,
)

__all__ = [
    "layer_norm_jacobian",
    "layer_norm_sigma",
    "layer_norm_sigma_bounds",
    "layer_norm_singular_values",
    "rms_norm_jacobian",
    "rms_norm_sigma",
    "rms_norm_sigma_bounds",
    "rms_norm_singular_values",
]
