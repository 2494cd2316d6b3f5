"""Figures, tables, LaTeX fragments and one self-contained HTML page, read from run folders only."""

from __future__ import annotations

from preln.report.build import build_report
from preln.report.load import Run, load_run

__all__ = ["Run", "build_report", "load_run"]
