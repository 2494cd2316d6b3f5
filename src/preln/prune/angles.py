"""The angle between two states."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from preln.models.residual import wide


def angles(x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Angle over pi, in [0, 1], in float32 or wider; 1/2 where a state is zero.

    ``2 atan2(|a - b|, |a + b|)`` on unit vectors a, b keeps its digits at every angle (Kahan 2006), where the
    arccos of a bfloat16 cosine is 0 for every angle up to 1/16 rad.

    >>> x = torch.tensor([1.0, 0.0])
    >>> angles(x, torch.tensor([0.0, 3.0])).item(), round(angles(x, torch.tensor([1.0, 1e-5])).item(), 8)
    (0.5, 3.18e-06)
    """
    a, b = (torch.nn.functional.normalize(wide(v), dim=-1, eps=0.0).nan_to_num(nan=0.0) for v in (x, y))
    length = torch.linalg.vector_norm
    found = 2.0 * torch.atan2(length(a - b, dim=-1), length(a + b, dim=-1)) / math.pi
    return torch.where((length(a, dim=-1) > 0) & (length(b, dim=-1) > 0), found, 0.5)
