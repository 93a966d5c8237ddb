"""Drawing an episode: multipliers as a heat map, losses and accuracy beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

SHADES = " .:-=+*#%@"


class EpisodeHistory:
    """What an episode has shown so far, one entry per env step."""

    def __init__(self, layer_groups: Sequence[str], horizon: int) -> None:
        self.layer_groups = tuple(layer_groups)
        self.horizon = horizon
        self.multipliers: list[np.ndarray] = []
        self.ce: list[float] = []
        self.kl: list[float] = []
        self.accuracy: list[float] = []  # empty where no real label is read

    def append(self, info: dict[str, Any]) -> None:
        """Add the `info` of one env step."""
        self.multipliers.append(info["lr_multipliers"])
        self.ce.append(info["loss/ce"])
        self.kl.append(info["loss/kl"])
        if "accuracy/outer_valid" in info:
            self.accuracy.append(info["accuracy/outer_valid"])

    def copy(self) -> "EpisodeHistory":
        """Return an independent copy."""
        twin = EpisodeHistory(self.layer_groups, self.horizon)
        twin.multipliers, twin.ce = list(self.multipliers), list(self.ce)
        twin.kl, twin.accuracy = list(self.kl), list(self.accuracy)
        return twin

    def log_multipliers(self) -> np.ndarray:
        """log10 of the multipliers, not below -3, shape (G, horizon); NaN where still to come."""
        grid = np.full((len(self.layer_groups), self.horizon), np.nan)
        for step, multipliers in enumerate(self.multipliers):
            grid[:, step] = np.log10(np.maximum(multipliers, 1e-3))
        return grid


def render_ansi(history: EpisodeHistory) -> str:
    """Text heat map: darker is a larger multiplier, from 0.001 or less to 1."""
    width = max(map(len, history.layer_groups))
    lines: list[str] = []
    for name, row in zip(history.layer_groups, history.log_multipliers(), strict=True):
        cells = "".join(
            "_" if np.isnan(v) else SHADES[round((v + 3) / 3 * (len(SHADES) - 1))]
            for v in np.minimum(row, 0)
        )
        now = f"{history.multipliers[-1][len(lines)]:.3g}" if history.multipliers else "-"
        lines.append(f"{name:>{width}} |{cells}| {now}")
    if history.ce:
        accuracy = f"  accuracy {history.accuracy[-1]:.3f}" if history.accuracy else ""
        lines.append(
            f"step {len(history.ce)}/{history.horizon}  ce {history.ce[-1]:.4f}  "
            f"kl {history.kl[-1]:.4f}{accuracy}"
        )
    return "\n".join(lines)


def render_rgb_array(history: EpisodeHistory) -> np.ndarray:
    """The same as a picture, uint8, shape (320, 800, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    heat, curves = figure.subplots(1, 2)
    image = heat.imshow(history.log_multipliers(), aspect="auto", vmin=-3, vmax=0, cmap="viridis")
    heat.set_yticks(range(len(history.layer_groups)), history.layer_groups)
    heat.set_xlabel("env step")
    figure.colorbar(image, ax=heat, label="log10 multiplier")
    steps = np.arange(len(history.ce))
    curves.plot(steps, history.ce, label="CE [nats]")
    curves.plot(steps, history.kl, label="KL [nats]")
    if history.accuracy:
        curves.plot(steps, history.accuracy, label="outer_valid accuracy")
    curves.set_xlim(-0.5, history.horizon - 0.5)
    curves.set_ylim(bottom=0)
    curves.set_xlabel("env step")
    curves.legend(loc="upper right")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
