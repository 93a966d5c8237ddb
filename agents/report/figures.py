"""Figures of a report: what a controller does over time, and how agents learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents.figures import FLOOR, on_windows
from agents.look import (
    CELLS,
    DASHES,
    HIGHLIGHT,
    INK,
    MARKERS,
    RIVALS,
    SMALL,
    empty_figure,
    style_axes,
)

WIDTH = 3.8  # inches: on a telephone text keeps its size
SHADES = 24  # of the scale of multipliers, eight a decade
MAX_WINDOWS = 40  # drawn; more are thinned out
NAME_LENGTH = 14  # letters of a layer group


@dataclass(frozen=True)
class Curve:
    """Median and quartiles of runs, each of shape (T,); NaN where no run is left."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Behaviour:
    """What a method does on instances of one kind, on T common windows.

    Attributes:
        edges: Progress where windows begin and end, shape (T + 1,).
        log_multipliers: Logarithm to base 10 of their geometric mean, shape (T, G).
        ce: Loss on training batches in nats.
        accuracy: On outer_valid, 0 from where a run diverged; None if never read.
        runs: How many there are.
        diverged: Share of them.
    """

    edges: np.ndarray
    log_multipliers: np.ndarray
    ce: Curve
    accuracy: Curve | None
    runs: int
    diverged: float


def behaviour(episodes: Sequence[Mapping[str, Any]]) -> Behaviour:
    """Put recorded episodes (`agents.records`) on common windows and average them.

    Raises:
        ValueError: There are none, or their parts do not fit together.
    """
    if not episodes:
        raise ValueError("there is no episode")
    edges = np.array(max((e["progress"] for e in episodes), key=len), float)
    if len(edges) > MAX_WINDOWS + 1:
        edges = np.linspace(0, 1, MAX_WINDOWS + 1)

    def gather(key: str) -> np.ndarray:
        return np.stack(
            [on_windows(np.array(e[key], float), np.array(e["progress"]), edges) for e in episodes]
        )

    logs = np.log10(np.maximum(gather("multipliers"), FLOOR))  # the maximum of NaN is NaN
    left = np.isfinite(logs).sum(axis=0)
    means = np.where(left > 0, np.nansum(logs, axis=0) / np.maximum(left, 1), np.nan)
    read = all(e["outer_valid"] for e in episodes)
    return Behaviour(
        edges,
        means,
        _curve(gather("ce")),
        _curve(np.nan_to_num(gather("outer_valid"))) if read else None,
        len(episodes),
        float(np.mean([e["diverged"] for e in episodes])),
    )


def _curve(values: np.ndarray) -> Curve:
    """Median and quartiles over rows, of what is finite."""
    parts = np.full((3, values.shape[1]), np.nan)
    there = np.isfinite(values).any(axis=0)
    finite = np.where(np.isfinite(values), values, np.nan)[:, there]
    parts[:, there] = np.nanquantile(finite, (0.5, 0.25, 0.75), axis=0)
    return Curve(*parts)


def common_limits(shown: Sequence[Behaviour]) -> dict[str, tuple[float, float]]:
    """Limits of the axes of loss and accuracy that all figures of a method share.

    The loss of runs that diverge is cut off where it would flatten all others.
    """
    limits = {}
    for name in ("ce", "accuracy"):
        curves = [curve for one in shown if (curve := getattr(one, name)) is not None]
        values = np.concatenate([[0.0], *([c.low, c.high] for c in curves)], axis=None)
        medians = np.concatenate([[0.0], *(c.median for c in curves)], axis=None)
        top = np.nanmax(values)
        if name == "ce":
            top = min(top, 3 * np.nanmax(medians))
        limits[name] = (0.0, 1.05 * float(top) or 1.0)
    return limits


def draw_behaviour(
    shown: Behaviour,
    name: str,
    layer_groups: Sequence[str],
    limits: Mapping[str, tuple[float, float]],
    rival: tuple[str, Behaviour] | None = None,
    accuracy: str = "accuracy",
) -> Figure:
    """Heat map of multipliers over time, with the curves of loss and accuracy beneath.

    Args:
        shown: Of the controller.
        name: What the controller is called.
        layer_groups: Names, input to head.
        limits: See `common_limits`.
        rival: Name and behaviour of a baseline on the same instances.
        accuracy: What is read on outer_valid.

    Raises:
        ValueError: Multipliers are not of these layer groups.
    """
    groups = shown.log_multipliers.shape[1]
    if groups != len(layer_groups):
        raise ValueError(f"`layer_groups` must be {groups} names, got {len(layer_groups)}")
    heights = [0.5 + 0.19 * groups, 1.35] + [1.35] * (shown.accuracy is not None)
    figure = empty_figure(WIDTH, sum(heights) + 1.0)
    panels: Any = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in panels:
        style_axes(axes)
        axes.label_outer()
    _heat_map(figure, panels[0], shown, layer_groups)
    named = [(name, shown)] if rival is None else [(name, shown), rival]
    for place, (label, one) in enumerate(named):
        _curve_with_band(panels[1], one.edges[1:], one.ce, label, place)
        if shown.accuracy is not None and one.accuracy is not None:
            _curve_with_band(panels[2], one.edges[1:], one.accuracy, label, place)
    panels[1].set_ylabel("loss (CE)")
    panels[1].set_ylim(*limits["ce"])
    if shown.accuracy is not None:
        panels[2].set_ylabel(f"outer_valid\n{accuracy}")
        panels[2].set_ylim(*limits["accuracy"])
    panels[-1].set_xlabel("progress of the training")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(
        handles,
        [_short_name(label, 24) for label in labels],
        loc="outside lower center",
        ncols=2,
        fontsize=SMALL,
        labelcolor=INK,
        frameon=False,
    )
    return figure


def _heat_map(figure: Figure, axes: Any, shown: Behaviour, layer_groups: Sequence[str]) -> None:
    image = axes.pcolormesh(
        shown.edges,
        np.arange(len(layer_groups) + 1) - 0.5,
        np.ma.masked_invalid(shown.log_multipliers.T),
        cmap=matplotlib.colormaps[CELLS].resampled(SHADES),
        vmin=np.log10(FLOOR),
        vmax=0,
        edgecolors="face",  # no light seams between cells
        linewidth=0.6,
        clip_on=False,  # a page is smaller without
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(len(layer_groups) - 0.5, -0.5)  # the input on top
    axes.set_yticks(
        range(len(layer_groups)), [_short_name(name, NAME_LENGTH) for name in layer_groups]
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)  # the darkest cells end where a dark page begins
    bar: Any = figure.colorbar(image, ax=axes, location="top", aspect=30, pad=0.03)
    bar.set_ticks([-3, -2, -1, 0], labels=["≤ 0.001", "0.01", "0.1", "1"])
    bar.set_label("multiplier", color=INK, fontsize=SMALL)
    bar.ax.tick_params(colors=INK, labelsize=SMALL, length=2)
    bar.outline.set_edgecolor(INK)
    bar.solids.set_edgecolor("face")


def _curve_with_band(axes: Any, at: np.ndarray, curve: Curve, label: str, place: int) -> None:
    """Draw a curve; at place 0 the learned agent, then a rival."""
    colour = RIVALS[0] if place else HIGHLIGHT
    style: dict[str, Any] = {"color": colour, "ls": DASHES[place], "zorder": 4 - place}
    marker = MARKERS[place] if len(at) < 4 else None  # so short a line may be overlooked
    axes.plot(at, curve.median, label=label, lw=2.0 - 0.5 * place, marker=marker, ms=4, **style)
    axes.fill_between(at, curve.low, curve.high, color=colour, alpha=0.18, lw=0)


def draw_learning(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str) -> Figure:
    """One line for each training seed, over the episodes of its training.

    Args:
        curves: Episodes and values, each shape (T,), by the name of the line.
        label: Of the vertical axis.

    Raises:
        ValueError: There is no curve.
    """
    if not curves:
        raise ValueError("there is nothing to draw: no curve was given")
    figure = empty_figure(WIDTH, 2.6 + 0.15 * (len(curves) // 3))
    axes: Any = figure.subplots()
    style_axes(axes)
    colours = (HIGHLIGHT, *RIVALS)
    for place, (name, (episodes, values)) in enumerate(curves.items()):
        axes.plot(
            episodes,
            values,
            label=name,
            color=colours[place % len(colours)],
            ls=DASHES[place // len(colours) % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)],
            markevery=(0.05 * (place % 4), 0.2),
            ms=4,
            lw=1.6,
        )
    axes.set_xlabel("episodes")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(
        loc="outside lower center", ncols=3, fontsize=SMALL, labelcolor=INK, frameon=False
    )
    return figure


def _short_name(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
