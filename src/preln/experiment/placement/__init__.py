"""Placement studies: models trained from scratch that differ only in where their norms sit."""

from __future__ import annotations

from preln.experiment.placement.lab import PlacementLab
from preln.experiment.placement.steps import placement_outline, placement_steps
from preln.experiment.placement.study import PlacementStudy, read_any_study

__all__ = ["PlacementLab", "PlacementStudy", "placement_outline", "placement_steps", "read_any_study"]
