"""A schedule as a heat map, in the terminal and as a picture."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.style import Style
from rich.text import Text

from agents.figures import FLOOR, save_figure
from asg_env.rendering import SHADES
from asg_env.schedule import LearnedSchedule

COLOURS = colormaps["viridis"]
COLUMNS = (20, 60)  # of the terminal, over which the training is spread: at least, at most


def _brightness(multipliers: np.ndarray) -> np.ndarray:
    """0 for `FLOOR` and below, 1 for a multiplier of 1 and above, even in the logarithm."""
    return np.asarray(np.clip(1 - np.log(np.maximum(multipliers, FLOOR)) / np.log(FLOOR), 0, 1))


def over_time(schedule: LearnedSchedule, columns: int) -> np.ndarray:
    """Multipliers in the middle of equal parts of the training, shape (G, columns)."""
    middles = (np.arange(columns) + 0.5) / columns
    return np.array([schedule.at(float(progress)) for progress in middles]).T


def heat_map(schedule: LearnedSchedule, terminal: int) -> Text:
    """Return the schedule as coloured text; a letter's density says it without colour too.

    Args:
        schedule: Any.
        terminal: Its width; where there is room for the map, no line is longer.
    """
    told = "start, peak, end"
    values = np.array(schedule.multipliers).T
    numbers = [f"{row[0]:.3g}, {row.max():.3g}, {row[-1]:.3g}" for row in values]
    width = max(map(len, schedule.layer_groups))
    columns = int(np.clip(terminal - width - 2 - max(map(len, [*numbers, told])), *COLUMNS))
    text = Text()
    rows = zip(schedule.layer_groups, over_time(schedule, columns), numbers, strict=True)
    for name, row, number in rows:
        text.append(f"{name:>{width}} ")
        for bright in _brightness(row):
            _cell(text, bright)
        text.append(f" {number}\n")
    text.append(f"{'':>{width}} start{'end':>{columns - 5}} {told}\n{'':>{width}} ")
    for power in np.arange(-3, 0.1, 0.5):
        _cell(text, float(_brightness(np.array(10.0**power))))
        text.append(f" {10.0**power:.2g}  ")
    return text


def _cell(text: Text, bright: float) -> None:
    red, green, blue = (round(255 * part) for part in COLOURS(bright)[:3])
    ink = "black" if bright > 0.5 else "white"
    style = Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")
    text.append(SHADES[round(bright * (len(SHADES) - 1))], style=style)


def draw_schedule(schedule: LearnedSchedule, path: Path) -> None:
    """Draw the multipliers over the training, a row for each layer group, as a PNG."""
    groups = list(schedule.layer_groups)
    figure = Figure(figsize=(7, 1.2 + 0.34 * len(groups)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = np.log10(np.maximum(over_time(schedule, 300), FLOOR))
    extent = (0.0, 1.0, len(groups) - 0.5, -0.5)
    image = axes.imshow(
        values, aspect="auto", vmin=-3, vmax=0, cmap=COLOURS, extent=extent, interpolation="nearest"
    )
    axes.set_yticks(range(len(groups)), groups)
    axes.set_xlabel("progress of the training")
    bar = figure.colorbar(image, ax=axes, label="multiplier")
    bar.set_ticks([-3, -2, -1, 0], labels=["0 to .001", ".01", ".1", "1"])
    save_figure(figure, path)
