"""Windows: how many inner steps each env step takes."""

from typing import Literal

WindowMode = Literal["asg-as-coded", "asg-intended"]

MIN_WINDOW = 10  # inner steps; the original's value for classification
WINDOW_SHRINK = 20


def constant_windows(inner_steps: int, horizon: int) -> tuple[int, ...]:
    """K inner steps, `horizon` times."""
    return (inner_steps,) * horizon


def growing_windows(mode: WindowMode, steps_per_epoch: int, epochs: int) -> tuple[int, ...]:
    """The original's growing windows, which fill `epochs` epochs exactly.

    Source: ASG (docs/original.md, section 2). K = max(10, cur + prev // 20), cut at the end of
    the epoch, where cur counts the steps done in this epoch and prev those of earlier ones.
    `asg-as-coded` keeps the original's operator precedence; `asg-intended` is what was probably
    meant, (cur + prev) // 20. Differs: the original's first 10 steps ran before the first
    decision, with every multiplier 1; here they are the first env step, under the agent.
    """
    windows = []
    for epoch in range(epochs):
        previous, current = epoch * steps_per_epoch, 0
        while current < steps_per_epoch:
            if mode == "asg-as-coded":
                length = current + previous // WINDOW_SHRINK
            else:
                length = (current + previous) // WINDOW_SHRINK
            length = min(max(MIN_WINDOW, length), steps_per_epoch - current)
            windows.append(length)
            current += length
    return tuple(windows)
