"""What a figure of the report is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from preln.report.load import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FigureSpec:
    """A figure's name, words and functions.

    Attributes:
        name: file name without ending.
        title: heading on the page.
        caption: how to read it.
        table: run -> the numbers plotted, or None where the run lacks them.
        draw: (run, width) -> figure.
        describe: numbers -> what the figure shows, for a reader who cannot see it.
    """

    name: str
    title: str
    caption: str
    table: Callable[[Run], pd.DataFrame | None]
    draw: Callable[[Run, str], Figure]
    describe: Callable[[pd.DataFrame], str]
