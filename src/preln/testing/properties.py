"""What a property check reports: examples, largest relative error, the input that gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preln.theory import Evidence

EXACT = 1e-9
"""Tolerance against torch's own functions in float64."""
BRIDGING = 1e-5
"""Tolerance against modules that compute in float32 whatever they are given."""

Property = Callable[[int], list[Evidence]]
"""rounds -> evidence"""


@dataclass
class Worst:
    """Keeps the largest error seen and where it was.

    Attributes:
        against: what is compared with what.
        tolerance: the largest relative error that passes.
    """

    against: str
    tolerance: float = EXACT
    examples: int = 0
    error: float = 0.0
    input: dict[str, Any] = field(default_factory=dict)

    def update(self, errors: Tensor, x: Tensor, **where: Any) -> None:
        """Take in one error a row of `x`; NaN counts as infinite."""
        errors = errors.detach().to(torch.float64).nan_to_num(nan=torch.inf)
        self.examples += len(errors)
        if len(errors) and (not self.input or float(errors.max()) > self.error):
            at = int(errors.argmax())
            self.error = float(errors[at])
            self.input = {"x": x[at].tolist()} | {
                k: v.tolist() if isinstance(v, Tensor) else v for k, v in where.items()
            }

    def evidence(self) -> Evidence:
        """Return `property` evidence; it passes if there were examples, all within the tolerance."""
        passed = self.examples > 0 and self.error <= self.tolerance
        detail = {
            "against": self.against,
            "n": self.examples,
            "largest_relative_error": self.error,
            "tolerance": self.tolerance,
            "worst_input": self.input,
        }
        if self.error == float("inf"):
            # JSON has no infinity.
            detail["largest_relative_error"] = None
        return Evidence("property", "pass" if passed else "fail", detail)
