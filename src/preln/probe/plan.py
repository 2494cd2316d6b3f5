"""What a probe is to do: settings that are known to make sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preln.data import fingerprint
from preln.models import Anatomy, model_fingerprint
from preln.models.residual import Tokens
from preln.probe.measures import JACOBIAN


@dataclass(frozen=True)
class Plan:
    """A model, tokens, and what to measure how.

    Attributes:
        model: The model.
        found: Its anatomy.
        tokens: All sequences.
        wanted: Names of measures.
        notes: What was left out, and why.
        batch_size: Sequences in one pass.
        seed: Fixes bootstrap, sketches and start vectors.
        bootstrap: Number of bootstrap samples.
        pairs: Whether to take angular distances.
        jacobian_sequences: How many sequences the Jacobian norms are taken on.
    """

    model: Any
    found: Anatomy
    tokens: Tokens
    wanted: set[str]
    notes: list[str]
    batch_size: int
    seed: int
    bootstrap: int
    pairs: bool
    jacobian_sequences: int

    @property
    def dtype(self) -> str:
        """The model's dtype."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def attention(self) -> str:
        """The model's attention implementation."""
        return str(getattr(self.model.config, "_attn_implementation", None))

    def identity(self, *, jacobians: bool = False) -> dict[str, Any]:
        """What must be equal for a stopped probe, or for its part on Jacobians, to go on."""
        settings = {"seed": self.seed, "attn_implementation": self.attention}
        if jacobians:
            settings["measures"] = sorted(self.wanted & set(JACOBIAN))
            settings["jacobian_sequences"] = self.jacobian_sequences
        else:
            settings["measures"] = sorted(self.wanted - set(JACOBIAN))
            settings |= {"batch_size": self.batch_size, "intervals": self.bootstrap > 0, "pairs": self.pairs}
        return {
            "model": model_fingerprint(self.model),
            "tokens": fingerprint(self.tokens.ids.cpu()),
            "mask": fingerprint(self.tokens.real.long().cpu()),
            "settings": settings,
        }
