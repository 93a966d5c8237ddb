"""Pictures of a run: what the controller does, and how it fares."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agents.evaluate import Row
from agents.rollout import Episode

HIGHLIGHT = "#c2410c"
OTHERS = ("#1d4ed8", "#047857", "#7c3aed", "#525252")
FLOOR = 1e-3  # multipliers at or below are drawn as this, 0 included


def draw_run(
    rows: Sequence[Row], summary: dict[str, Any], layer_groups: Sequence[str], path: Path
) -> None:
    """Draw the controller's heat map, the accuracy curves and the comparison.

    Args:
        rows: Results, the controller first.
        summary: `agents.evaluate.summarise` of them.
        layer_groups: Names, input to head.
        path: PNG file to write.
    """
    figure = Figure(figsize=(13, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    heat, curves, bars = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1.2))
    episodes = _episodes(rows[0])
    _heat_map(figure, heat, episodes, layer_groups)
    _accuracy_curves(curves, rows, summary)
    _comparison(bars, summary)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG to a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _episodes(row: Row) -> list[Episode]:
    return [result.episode for results in row.results for result in results]


def _heat_map(
    figure: Figure, axes: Any, episodes: Sequence[Episode], layer_groups: Sequence[str]
) -> None:
    horizon = max(len(e.multipliers) for e in episodes)
    grid = np.full((len(episodes), horizon, len(layer_groups)), np.nan)
    for row, episode in zip(grid, episodes, strict=True):
        row[: len(episode.multipliers)] = np.log10(np.maximum(episode.multipliers, FLOOR))
    image = axes.imshow(
        np.nanmean(grid, axis=0).T,
        aspect="auto",
        cmap="viridis",
        vmin=-3,
        vmax=0,
        extent=(0, 1, len(layer_groups) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(layer_groups)), layer_groups)
    axes.set_xlabel("progress of the training")
    axes.set_title("controller: mean log10 multiplier")
    figure.colorbar(image, ax=axes)


def _accuracy_curves(axes: Any, rows: Sequence[Row], summary: dict[str, Any]) -> None:
    others = [r for r in rows[1:] if r.name in ("static search", "uniform", "cosine", "back-off")]
    for row, colour in zip([rows[0], *others], (HIGHLIGHT, *OTHERS), strict=False):
        episodes = [e for e in _episodes(row) if len(e.accuracy)]
        if not episodes:
            continue
        horizon = max(len(e.accuracy) for e in episodes)
        curves = np.zeros((len(episodes), horizon))  # a diverged run scores 0 from then on
        for line, episode in zip(curves, episodes, strict=True):
            line[: len(episode.accuracy)] = episode.accuracy
        x = np.arange(1, horizon + 1) / horizon
        middle = curves.mean(axis=0)
        low, high = np.quantile(curves, (0.25, 0.75), axis=0)
        axes.plot(x, middle, color=colour, label=row.name, lw=2 if row is rows[0] else 1.2)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("progress of the training")
    axes.set_title("outer_valid accuracy: mean and middle half of runs")
    axes.legend(fontsize=8, loc="lower right")


def _comparison(axes: Any, summary: dict[str, Any]) -> None:
    table = sorted(summary["rows"], key=lambda entry: entry["accuracy"]["iqm"])
    for height, entry in enumerate(table):
        estimate = entry["accuracy"]
        ours = entry["name"].startswith("controller")
        colour = HIGHLIGHT if ours else "#9ca3af" if entry["reference"] else "#374151"
        axes.plot([estimate["low"], estimate["high"]], [height, height], color=colour, lw=2)
        axes.plot(estimate["iqm"], height, "o", color=colour, ms=5)
    axes.set_yticks(range(len(table)), [entry["name"] for entry in table], fontsize=8)
    axes.set_xlabel("test accuracy: IQM, 95 % interval")
    axes.set_title("unseen instances")
    axes.grid(axis="x", alpha=0.3)
