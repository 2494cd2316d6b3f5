"""Studies: hypotheses fixed in YAML, steps that survive a kill, verdicts from stored tables."""

from __future__ import annotations

from preln.experiment.engines import Engine
from preln.experiment.placement import read_any_study as read_study
from preln.experiment.run import default_out, dry_run, run_study
from preln.experiment.store import RunStore, Step
from preln.experiment.study import Study
from preln.experiment.study_file import study_schema

__all__ = ["Engine", "RunStore", "Step", "Study", "default_out", "dry_run", "read_study", "run_study",
           "study_schema"]  # fmt: skip
