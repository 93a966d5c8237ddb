"""Figures of a benchmark, one function each, from statistics to a matplotlib figure.

They are narrow enough for a phone and look as `agents.look` says. Colour is never alone in telling
things apart: names stand beside lines, and curves have dashes and markers too. The caller writes
files: `agents.figures.save_figure`, or SVG with text kept as text under
`matplotlib.rc_context({"svg.fonttype": "none"})`.
"""

import itertools
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents.benchmark.statistics import Band, Interval
from agents.look import (
    CELLS,
    DASHES,
    HIGHLIGHT,
    INK,
    MARKERS,
    RIVALS,
    SMALL,
    TEXT,
    empty_figure,
    style_axes,
)

WIDTH = 4.8  # inches
NAME_LENGTH, LEGEND_LENGTH = 20, 22  # letters, beyond which a name is broken into lines


def draw_aggregates(
    intervals: Mapping[str, Interval],
    learned: Collection[str] = (),
    label: str = "interquartile mean of test accuracy",
) -> Figure:
    """One line for each agent, the best on top.

    Args:
        intervals: By name of the agent.
        learned: Names of the learned agents.
        label: Of the axis.

    Raises:
        ValueError: There is no agent.
    """
    ordered = sorted(intervals, key=lambda name: intervals[name].value)
    return _interval_lines(intervals, ordered, learned, label)


def draw_optimality_gaps(
    intervals: Mapping[str, Interval], learned: Collection[str] = ()
) -> Figure:
    """One line for each agent, the smallest gap on top; arguments as in `draw_aggregates`."""
    ordered = sorted(intervals, key=lambda name: -intervals[name].value)
    return _interval_lines(intervals, ordered, learned, "optimality gap (lower is better)")


def draw_improvement(
    intervals: Mapping[str, Interval], agent: str, learned: Collection[str] = ()
) -> Figure:
    """Chance that an agent beats each rival, the surest on top, with a mark at one half.

    Args:
        intervals: `probability_of_improvement` over each rival, by the rival's name.
        agent: Whose chance it is.
        learned: Names of the learned agents.

    Raises:
        ValueError: There is no rival.
    """
    ordered = sorted(intervals, key=lambda name: intervals[name].value)
    label = _broken(f"chance that {agent} does better than", 44)
    figure = _interval_lines(intervals, ordered, learned, label)
    axes = figure.axes[0]
    axes.axvline(0.5, color=INK, lw=1.2, ls=(0, (4, 2)), zorder=0)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    return figure


def draw_profiles(
    bands: Mapping[str, Band], learned: Collection[str] = (), metric: str = "accuracy"
) -> Figure:
    """Share of units above each threshold: the higher the curve, the better.

    Args:
        bands: `performance_profile` of each agent, by name, in the order of the legend.
        learned: Names of the learned agents.
        metric: What scores are, in words.

    Raises:
        ValueError: There is no agent.
    """
    figure = _curves(bands, learned, steps=True)
    beside = "share of runs with\n" + _broken(f"test {metric} above τ", 22)
    _name_axes(figure, "threshold τ", beside)
    axes = figure.axes[0]
    axes.set_ylim(-0.02, 1.02)
    falling = [
        band.at[(band.value < band.value[0] - 0.02) & (band.value > 0.01)]
        for band in bands.values()
    ]
    if any(map(len, falling)):  # where curves are level there is nothing to see
        within = np.concatenate(falling)
        axes.set_xlim(within.min() - 0.05, within.max() + 0.05)
    return figure


def draw_sample_efficiency(
    bands: Mapping[str, Band],
    learned: Collection[str] = (),
    label: str = "interquartile mean\nof test accuracy",
) -> Figure:
    """Curves over the inner steps spent on training.

    Args:
        bands: `sample_efficiency` of each agent, by name, in the order of the legend.
        learned: Names of the learned agents.
        label: Of the vertical axis.

    Raises:
        ValueError: There is no agent.
    """
    figure = _curves(bands, learned, steps=False)
    _name_axes(figure, "inner steps spent on training", label)
    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda steps, _: _short(steps))
    return figure


def draw_transfer(
    values: np.ndarray,
    trained_on: Sequence[str],
    tested_on: Sequence[str],
    metric: str = "accuracy",
) -> Figure:
    """Matrix of what agents trained on one family reach on another, with numbers in the cells.

    Args:
        values: Shape (R, C); NaN where nothing was tested.
        trained_on: Names of the rows.
        tested_on: Names of the columns.
        metric: What scores are, in words.

    Raises:
        ValueError: Names and values do not match, or there are none.
    """
    if values.size == 0 or values.shape != (len(trained_on), len(tested_on)):
        raise ValueError(
            "`values` must have a row for each family trained on and a column for each tested "
            f"on, got shape {values.shape} for {len(trained_on)} and {len(tested_on)}"
        )
    figure, axes = _new_figure(len(trained_on), 1.5 + 0.46 * len(trained_on))
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    sides = [np.arange(count + 1) - 0.5 for count in reversed(values.shape)]
    image = axes.pcolormesh(  # not an image: in an SVG it would have to be embedded
        *sides, np.ma.masked_invalid(values), cmap=CELLS, vmin=low, vmax=high, edgecolors="face"
    )
    axes.invert_yaxis()
    upright = len(tested_on) > 5  # side by side there is no room
    axes.set_xticks(
        range(len(tested_on)),
        [_broken(name, NAME_LENGTH if upright else 9) for name in tested_on],
        rotation=90 if upright else 0,
    )
    axes.set_yticks(range(len(trained_on)), [_broken(name) for name in trained_on])
    for (row, column), value in np.ndenumerate(values):
        ink, text = INK, "–"
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"
            text = f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("tested on")
    axes.set_ylabel("trained on")
    figure.supxlabel(f"interquartile mean of test {metric}", fontsize=SMALL, color=INK)
    return figure


def _interval_lines(
    intervals: Mapping[str, Interval],
    ordered: Sequence[str],
    learned: Collection[str],
    label: str,
) -> Figure:
    """One line for each name from the bottom up, the value written above its mark."""
    names = [_broken(name) for name in ordered]
    lines = max((name.count("\n") + 1 for name in names), default=0)
    row = max(0.42, 0.1 + 0.15 * lines)  # inches
    figure, axes = _new_figure(len(ordered), 0.9 + row * len(ordered))
    for height, name in enumerate(ordered):
        interval = intervals[name]
        colour = HIGHLIGHT if name in learned else RIVALS[0]
        axes.plot([interval.low, interval.high], [height, height], color=colour, lw=2.4)
        axes.plot(interval.value, height, "D" if name in learned else "o", color=colour, ms=6)
        axes.annotate(
            f"{interval.value:.3f}",
            (interval.value, height),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=colour,
        )
    axes.set_yticks(range(len(ordered)), names)
    for tick, name in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color(HIGHLIGHT if name in learned else INK)
    axes.set_ylim(-0.5, len(ordered) - 0.2)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(label)
    return figure


def _curves(bands: Mapping[str, Band], learned: Collection[str], steps: bool) -> Figure:
    """A panel for each learned agent: its curve and band before those of all others.

    In one panel seven agents could not be told apart. The other agents are thin and grey, the
    rivals the same in every panel, and the legend is common.
    """
    ours = [name for name in bands if name in learned]
    rivals = [name for name in bands if name not in learned]
    columns = 2 if len(ours) > 1 else 1
    rows = max(1, math.ceil(len(ours) / columns))
    figure = _figure_of(len(bands), 3.3 if columns == 1 else 0.8 + 1.5 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    style = "steps-post" if steps else "default"
    for place, (axes, name) in enumerate(itertools.zip_longest(grid.flat, ours)):
        if name is None and ours:
            axes.set_axis_off()  # the last row is not full
            continue
        style_axes(axes)
        if place + columns >= len(ours):
            axes.tick_params(labelbottom=True)
        for other in ours:
            if other != name:
                band = bands[other]
                line = {"color": INK, "lw": 0.9, "alpha": 0.7, "label": "the other agents"}
                axes.plot(band.at, band.value, drawstyle=style, **line)
        for number, rival in enumerate(rivals):
            colour = RIVALS[number % len(RIVALS)]
            marker = MARKERS[1 + number % (len(MARKERS) - 1)]
            dashes = DASHES[(number // len(RIVALS) + 1) % len(DASHES)]
            _curve(axes, rival, bands[rival], colour, dashes, marker, style, bold=False)
        if name is not None:
            _curve(axes, name, bands[name], HIGHLIGHT, "-", MARKERS[0], style, bold=True)
            if columns > 1:
                axes.lines[-1].set_label("the agent of the panel")
                axes.set_title(_broken(name), fontsize=SMALL, color=HIGHLIGHT)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries,
        loc="outside upper center",
        ncols=min(len(entries), 2),
        fontsize=SMALL,
        labelcolor=INK,
        frameon=False,
        handlelength=3,
        columnspacing=1.2,
    )
    lines = sum(label.count("\n") + 1 for label in list(entries)[::2])
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)
    return figure


def _curve(
    axes: Any,
    name: str,
    band: Band,
    colour: str,
    dashes: Any,
    marker: str,
    style: str,
    bold: bool,
) -> None:
    """One curve with its band."""
    axes.plot(
        band.at,
        band.value,
        label=_broken(name, LEGEND_LENGTH),
        color=colour,
        ls=dashes,
        lw=2.0 if bold else 1.5,
        marker=marker,
        markevery=(0.02 + 0.03 * MARKERS.index(marker), 0.2),
        ms=4,
        drawstyle=style,
        zorder=4 if bold else 3,
    )
    axes.fill_between(
        band.at,
        band.low,
        band.high,
        color=colour,
        alpha=0.22 if bold else 0.1,
        lw=0,
        step="post" if style == "steps-post" else None,
        zorder=2,
    )


def _name_axes(figure: Figure, below: str, beside: str) -> None:
    """Name the axes that all panels of a figure share."""
    figure.supxlabel(below, fontsize=TEXT, color=INK)
    figure.supylabel(beside, fontsize=TEXT, color=INK, ma="center")


def _figure_of(items: int, height: float) -> Figure:
    """Return a figure of the common look, without axes."""
    if items == 0:
        raise ValueError("there is nothing to draw: no agent was given")
    return empty_figure(WIDTH, height)


def _new_figure(items: int, height: float) -> tuple[Figure, Any]:
    """Return a figure of the common look and its axes."""
    figure = _figure_of(items, height)
    axes: Any = figure.subplots()
    style_axes(axes)
    return figure, axes


def _broken(name: str, length: int = NAME_LENGTH) -> str:
    """Break a name into lines, at hyphens only where a word alone is too long."""
    too_long = any(len(word) > length for word in name.split())
    return textwrap.fill(name, length, break_on_hyphens=too_long)


def _short(steps: float) -> str:
    """Whole steps, thousands as k, millions as M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(steps) >= size:
            return f"{steps / size:g}{letter}"
    return f"{steps:g}"
