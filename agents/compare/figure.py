"""The picture of a comparison: accuracy against retention, and drift by layer group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from agents.figures import HIGHLIGHT, save_figure
from agents.results import IN_WORDS

PAPER, OTHER = "#1d4ed8", "#525252"
LEAST_DRIFT = 1e-4  # drawn as this, 0 included
LEAST_FORGOTTEN = 3e-3  # likewise
FORGOTTEN_TICKS = (0.003, 0.01, 0.03, 0.1, 0.3, 1)


def draw_comparison(summary: Mapping[str, Any], layer_groups: Sequence[str], path: Path) -> None:
    """Draw both panels; the numbers of the points are those of the rows beside the heat map.

    Args:
        summary: `agents.compare.results.summarise` of the rows.
        layer_groups: Names, input to head.
        path: PNG file to write.
    """
    rows = summary["rows"]
    figure = Figure(figsize=(13, max(4.5, 1.2 + 0.28 * len(rows))), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    points, heat = figure.subplots(1, 2, width_ratios=(1.15, 1))
    shown: list[float] = []
    for number, row in enumerate(rows, start=1):
        accuracy, retention = row["accuracy"], row["retention"]
        if accuracy is None or retention is None:
            continue
        colour = HIGHLIGHT if row["controller"] else PAPER if row["paper"] else OTHER
        # Most methods forget little: on a logarithmic axis they can be told apart.
        x, *span = (max(1 - retention[key], LEAST_FORGOTTEN) for key in ("iqm", "low", "high"))
        y = accuracy["iqm"]
        shown += [x, *span]
        points.plot([x, x], [accuracy["low"], accuracy["high"]], color=colour, lw=1, alpha=0.3)
        points.plot(span, [y, y], color=colour, lw=1, alpha=0.3)
        points.plot(x, y, "o", color=colour, ms=4)
        points.annotate(
            str(number), (x, y), (3, 3), textcoords="offset points", color=colour, weight="bold"
        )
    points.set_xscale("log")
    if shown:
        points.set_xlim(min(shown) / 1.4, max(shown) * 1.4)
    points.xaxis.set_major_locator(FixedLocator(FORGOTTEN_TICKS))
    points.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    points.xaxis.set_minor_locator(NullLocator())
    points.invert_xaxis()
    points.set_xlabel("forgotten: 1 - retention of the old task")
    points.set_ylabel(f"target {IN_WORDS[summary['metric']]}")
    points.set_title("up: works on real images; right: remembers", fontsize=10)
    points.grid(alpha=0.3)
    points.autoscale_view()
    names = [f"{row['name']}  {number}" for number, row in enumerate(rows, start=1)]
    drifts = np.array([[np.nan if d is None else d for d in row["drifts"]] for row in rows])
    image = heat.imshow(
        np.log10(np.maximum(drifts, LEAST_DRIFT)), aspect="auto", cmap="viridis", vmin=-4, vmax=1
    )
    heat.set_yticks(range(len(rows)), names, fontsize=8)
    heat.set_xticks(range(len(layer_groups)), layer_groups, fontsize=8)
    for label, row in zip(heat.get_yticklabels(), rows, strict=True):
        label.set_color(HIGHLIGHT if row["controller"] else PAPER if row["paper"] else OTHER)
    for (line, column), drift in np.ndenumerate(drifts):
        text = "–" if np.isnan(drift) else f"{drift:.2g}"
        ink = "black" if drift > 1 else "white"
        heat.text(column, line, text, ha="center", va="center", fontsize=6.5, color=ink)
    heat.set_title("drift |w - w0| / |w0| by layer group", fontsize=10)
    bar = figure.colorbar(image, ax=heat, ticks=[-4, -3, -2, -1, 0, 1])
    bar.ax.set_yticklabels(["≤ 0.0001", "0.001", "0.01", "0.1", "1", "≥ 10"])
    figure.suptitle(
        "Blue: rows of the original's table; orange: learned controllers; grey: other rules",
        fontsize=10,
    )
    save_figure(figure, path)
