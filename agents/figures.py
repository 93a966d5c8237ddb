"""Pictures of a run: what the controller does, and how it fares."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agents.evaluate import Row
from agents.results import IN_WORDS
from agents.rollout import Episode
from asg_env.files import replacing

HIGHLIGHT = "#c2410c"
OTHERS = {"static search": "#1d4ed8", "uniform": "#047857", "back-off": "#525252"}
FLOOR = 1e-3  # multipliers at or below are drawn as this, 0 included
SCALE_BANDS = (0.0, 0.46, 2.15, float("inf"))  # thirds of the log range 0.1 to 10


def draw_run(
    rows: Sequence[Row], summary: dict[str, Any], layer_groups: Sequence[str], path: Path
) -> None:
    """Draw the controller's heat maps, the accuracy curves and the comparison.

    Args:
        rows: Results, the controller first.
        summary: `agents.summary.summarise` of them.
        layer_groups: Names, input to head.
        path: PNG file to write.
    """
    figure = Figure(figsize=(12, 7.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(0.8, 1))
    _heat_maps(parts[0], _episodes(rows[0]), layer_groups)
    curves, bars = parts[1].subplots(1, 2)
    metric = IN_WORDS[summary["protocol"]["metric"]]
    _accuracy_curves(curves, rows, metric)
    _comparison(bars, summary)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG to a temporary name, then rename."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _episodes(row: Row) -> list[Episode]:
    return [result.episode for results in row.results for result in results]


def _heat_maps(figure: Any, episodes: Sequence[Episode], layer_groups: Sequence[str]) -> None:
    """Geometric-mean multipliers, one map for each third of the hidden scales that is there."""
    bands = []
    for low, high in zip(SCALE_BANDS[:-1], SCALE_BANDS[1:], strict=True):
        inside = [e for e in episodes if low <= e.instance.base_lr_scale < high]
        if inside:
            scales = [e.instance.base_lr_scale for e in inside]
            span = f"hidden scale {min(scales):.2g} to {max(scales):.2g}"
            bands.append((span if min(scales) < max(scales) else f"scale {scales[0]:g}", inside))
    axes = figure.subplots(1, len(bands), sharey=True, squeeze=False)[0]
    for panel, (title, inside) in zip(axes, bands, strict=True):
        edges = max((e.progress for e in inside), key=len)
        logs = [np.log10(np.maximum(e.multipliers, FLOOR)) for e in inside]
        grid = np.stack(
            [on_windows(log, e.progress, edges) for log, e in zip(logs, inside, strict=True)]
        )
        image = panel.pcolormesh(
            edges,
            np.arange(len(layer_groups) + 1) - 0.5,
            np.nanmean(grid, axis=0).T,
            cmap="viridis",
            vmin=-3,
            vmax=0,
        )
        panel.set_xlim(0, 1)
        panel.set_ylim(len(layer_groups) - 0.5, -0.5)  # the input on top
        panel.set_yticks(range(len(layer_groups)), layer_groups)
        panel.set_xlabel("progress of the training")
        panel.set_title(f"{title} ({len(inside)} runs)", fontsize=10)
    bar = figure.colorbar(image, ax=list(axes), label="multiplier", ticks=[-3, -2, -1, 0])
    bar.ax.set_yticklabels(["≤ 0.001", "0.01", "0.1", "1"])
    figure.suptitle("What the controller does on unseen instances", fontsize=11)


def on_windows(values: np.ndarray, progress: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Put what an episode has for each of its windows on windows that all episodes share.

    Args:
        values: Shape (T, ...).
        progress: Where the episode's windows begin, and where it ended, shape (T + 1,).
        edges: Where the common windows begin and end, shape (U + 1,).

    Returns:
        Shape (U, ...): the value in the middle of each common window, NaN beyond the end.
    """
    middle = (edges[:-1] + edges[1:]) / 2
    index = np.searchsorted(progress, middle, side="right") - 1
    there = index < len(values)
    found = np.full((len(middle), *values.shape[1:]), np.nan)
    found[there] = values[index[there]]
    return found


def _accuracy_curves(axes: Any, rows: Sequence[Row], metric: str) -> None:
    others = [row for row in rows[1:] if row.name in OTHERS]
    for row in [rows[0], *others]:
        episodes = [e for e in _episodes(row) if len(e.accuracy)]
        if not episodes:
            continue
        edges = max((e.progress for e in episodes), key=len)
        # A diverged run scores 0 from then on.
        curves = np.nan_to_num([on_windows(e.accuracy, e.progress, edges) for e in episodes])
        x = edges[1:]
        colour = OTHERS.get(row.name, HIGHLIGHT)
        low, high = np.quantile(curves, (0.25, 0.75), axis=0)
        axes.plot(x, curves.mean(axis=0), color=colour, label=row.name, lw=1.8)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("progress of the training")
    axes.set_ylabel(f"outer_valid {metric}")
    axes.set_title("mean and middle half of the runs", fontsize=10)
    if axes.lines:
        axes.legend(fontsize=8, loc="lower right")
    else:
        axes.text(0.5, 0.5, "the reward reads no real label", ha="center")


def _comparison(axes: Any, summary: dict[str, Any]) -> None:
    table = sorted(summary["rows"], key=lambda entry: entry["accuracy"]["iqm"])
    for height, entry in enumerate(table):
        estimate = entry["accuracy"]
        ours = entry["name"].startswith("controller")
        colour = HIGHLIGHT if ours else "#9ca3af" if entry["reference"] else "#374151"
        axes.plot([estimate["low"], estimate["high"]], [height, height], color=colour, lw=2)
        axes.plot(estimate["iqm"], height, "o", color=colour, ms=5)
    axes.set_yticks(range(len(table)), [entry["name"] for entry in table], fontsize=8)
    axes.set_xlabel(f"test {IN_WORDS[summary['protocol']['metric']]}")
    axes.set_title("interquartile mean and 95 % interval (grey: knows the scale)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
