"""Criteria that read the weights alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.residual import wide
from preln.prune.evidence import Array, Evidence
from preln.prune.registry import criterion


def check_floating(blocks: Iterable[nn.Module], name: str) -> None:
    """Refuse weights that are codes of numbers instead of numbers.

    Raises:
        InputError: Naming the weight.
    """
    for index, block in enumerate(blocks):
        for path, parameter in block.named_parameters():
            if not parameter.is_floating_point():
                raise InputError(
                    f"{name}: block {index}: {path!r} is stored as {parameter.dtype}: quantised weights have "
                    "no magnitude and no gradient here: load the model in a floating-point dtype"
                )


def _weights(evidence: Evidence, name: str) -> list[list[Tensor]]:
    """The parameters of every block that are named weights: norm gains are among them, biases are not."""
    check_floating(evidence.blocks, name)
    return [
        [wide(p.detach()) for path, p in block.named_parameters() if path.endswith("weight")]
        for block in evidence.blocks
    ]


@criterion("magnitude_l1")
def magnitude_l1(evidence: Evidence) -> Array:
    """Sum over the block's weights of ``|w|``: norm gains included, biases not."""
    groups = _weights(evidence, "magnitude_l1")
    return np.array([sum(float(w.abs().sum(dtype=torch.float64)) for w in group) for group in groups])


@criterion("magnitude_l2")
def magnitude_l2(evidence: Evidence) -> Array:
    """Sum over the block's matrices of their Frobenius norms (not of the squares: the order differs)."""
    check_floating(evidence.blocks, "magnitude_l2")
    return np.array(
        [
            sum(
                float(wide(p.detach()).square().sum(dtype=torch.float64).sqrt())
                for p in block.parameters()
                if p.ndim > 1
            )
            for block in evidence.blocks
        ]
    )


@criterion("magnitude_l2_squared")
def magnitude_l2_squared(evidence: Evidence) -> Array:
    """Sum over the block's weights of ``w^2``, as public code has it for "l2": norm gains included."""
    groups = _weights(evidence, "magnitude_l2_squared")
    return np.array([sum(float(w.square().sum(dtype=torch.float64)) for w in group) for group in groups])
