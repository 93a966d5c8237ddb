"""The look that the figures of benchmarks and reports share.

They have no background of their own, and every colour stands out from white and from near-black by
at least 3.4 to 1, so that one picture serves light and dark pages.
"""

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HIGHLIGHT = "#d9580d"  # learned agents
RIVALS = ("#2f7fd6", "#0f9d7a", "#bf5599")  # apart with any one kind of colour blindness
INK = "#7a7a7a"  # text, axes
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")  # agents', then five of rivals: 15 differ with RIVALS
CELLS = "viridis"  # of the transfer matrix; its cells are opaque

TEXT, SMALL = 10, 9  # points


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure without axes; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    return figure


def style_axes(axes: Any) -> None:
    """Give axes the common look: see-through, grey, with a faint grid."""
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=INK, labelsize=SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(TEXT)
    axes.spines[:].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
