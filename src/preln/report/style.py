"""How every figure looks and how it becomes bytes.

The palette is Okabe and Ito's (2008), which stays apart under the common colour-vision deficiencies; yellow
is left out because it vanishes on white paper. Bytes are deterministic: no dates, no versions, a fixed salt
for SVG ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError, require

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

PALETTE = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
CYCLE = tuple(PALETTE.values())
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (7, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
# Not pure black and white: on the page these two are swapped for the reader's own ink and paper (dark mode).
INK = "#202020"
PAPER = "#fefefe"
WIDTHS = {"single": 3.4, "double": 7.0}
"""Column widths in inches, as journals set them."""

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "preln",
    "pdf.fonttype": 42,
    # Names come from data: a dollar sign in one is a dollar sign, never mathematics.
    "text.parse_math": False,
    "text.usetex": False,
}
_METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of the report, from its defaults and not from the user's own style file."""
    matplotlib = require("matplotlib", extra="report")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(width: str, height: float, **subplots: Any) -> tuple[Figure, np.ndarray]:
    """A figure of a column's width and its axes, without pyplot's global state.

    Args:
        width: "single" (3.4 in) or "double" (7 in).
        height: inches.
        **subplots: passed on to `Figure.subplots` (`squeeze` is always False).

    Returns:
        The figure and its axes, a 2-d array of objects.

    Raises:
        InputError: unknown width.
    """
    require("matplotlib", extra="report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if width not in WIDTHS:
        raise InputError(f"{width!r}: no such figure width: choose one of {', '.join(WIDTHS)}")
    figure = Figure(figsize=(WIDTHS[width], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(squeeze=False, **subplots)


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a `pdf`, `png` or `svg`; the same figure gives the same bytes every time."""
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    buffer = io.BytesIO()
    # Laid out once, and the same for every format: the layout is a large part of the work.
    if not isinstance(figure.get_layout_engine(), PlaceHolderLayoutEngine | None):
        with house_style():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
    face = "none" if kind == "svg" else "white"
    with house_style():
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind], facecolor=face)
    return buffer.getvalue()


def settle(figure: Figure) -> None:
    """Lay the figure out once before it is rendered: long labels need a second pass to find their room."""
    figure.draw_without_rendering()


def inline_svg(figure: Figure, *, prefix: str) -> str:
    """The figure as an `<svg>` element to stand inside a page.

    Ids get a prefix (a page holds many figures), ink and paper become the page's own, and palette colours
    become CSS variables `--fig-NAME`, so that a style sheet can lighten them in the dark.
    """
    text = render(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--fig-paper, #fff)")
    for name, colour in PALETTE.items():
        text = text.replace(colour, f"var(--fig-{name}, {colour})")
    # Width and height in points would defeat a responsive page; the view box keeps the proportions.
    opening, rest = text.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    opening = opening.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    return re.sub(r"\n\s*\n+", "\n", f"{opening}>{rest}").strip()


def scale_axis(axis: XAxis | YAxis, values: Sequence[float] | np.ndarray) -> None:
    """Logarithmic where all finite values are positive and span a factor above 3, else linear or symlog."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    sizes = np.abs(finite[finite != 0])
    spread = sizes.max() / sizes.min() if sizes.size else 1.0
    if finite.size and (finite > 0).all() and spread > 3:
        set_scale("log")
        decades = np.log10(spread)
        subs = (1, 2, 3, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 2 else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8 if decades >= 2 else 12))
        axis.set_minor_formatter(NullFormatter())
    elif spread > 100:
        threshold = 10.0 ** np.floor(np.log10(np.quantile(sizes, 0.25)))
        set_scale("symlog", linthresh=threshold)
        locator = SymmetricalLogLocator(linthresh=threshold, base=10)
        locator.set_params(numticks=7)
        axis.set_major_locator(locator)
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def short(name: str, limit: int = 26) -> str:
    """A name cut to fit beside an axis.

    >>> short("block_influence"), short("a" * 40, limit=5)
    ('block_influence', 'aaaa…')
    """
    return name if len(name) <= limit else name[: limit - 1] + "…"


def plain(value: float) -> str:
    """A tick label in plain digits with a true minus sign; powers of ten only where digits would run long."""
    text = (
        f"{value:.3g}"
        if value == 0 or 1e-4 <= abs(value) < 1e5
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )
    if "e" in text and abs(value) >= 1000 and 1e-4 <= abs(value) < 1e5:
        text = f"{value:.0f}"
    return text.replace("-", "−")


def need(present: Any, what: str) -> None:
    """Refuse to draw an empty figure.

    Raises:
        InputError: `present` is empty, zero or false.
    """
    if not present:
        raise InputError(f"nothing to draw: the table holds no {what}")


def block_axis(axes: Axes, label: str = "block") -> None:
    """Whole-number ticks on the depth axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel(label)
