"""Actions: how an agent's choice becomes one learning-rate multiplier per layer group."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

ActionName = Literal["grid", "relative", "box"]
GridName = Literal["log", "linear"]

GRIDS: dict[GridName, tuple[float, ...]] = {
    "log": (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "linear": tuple(level / 10 for level in range(11)),  # the original's
}
BOX_DECADES = 3.0  # multipliers of the box action span 10**-3 to 1


class GridAction:
    """Per group an index into the grid of multipliers: `MultiDiscrete([M] * G)`.

    Source: ASG's action, with its 11 levels as the `linear` grid (docs/original.md, section 2).
    """

    def __init__(self, grid: GridName, groups: int) -> None:
        self._grid = GRIDS[grid]
        self.space = spaces.MultiDiscrete([len(self._grid)] * groups)

    def decode(self, action: Any, multipliers: Sequence[float]) -> tuple[float, ...]:
        """Return the multipliers of the next window; where the groups stand is not used."""
        return tuple(self._grid[int(level)] for level in action)


class RelativeAction:
    """Per group one step down (0), stay (1) or one step up (2) on the grid.

    The step starts from the grid level nearest to where the group stands, and the ends of the
    grid hold.
    """

    def __init__(self, grid: GridName, groups: int) -> None:
        self._grid = GRIDS[grid]
        self.space = spaces.MultiDiscrete([3] * groups)

    def decode(self, action: Any, multipliers: Sequence[float]) -> tuple[float, ...]:
        """Return the multipliers of the next window."""
        levels = np.asarray(self._grid)
        decoded = []
        for move, multiplier in zip(action, multipliers, strict=True):
            level = int(np.abs(levels - multiplier).argmin()) + int(move) - 1
            decoded.append(self._grid[min(max(level, 0), len(self._grid) - 1)])
        return tuple(decoded)


class BoxAction:
    """Per group a real number a in [-1, 1]: multiplier 10**(1.5 (a - 1)), from 0.001 to 1."""

    def __init__(self, grid: GridName, groups: int) -> None:
        self.space = spaces.Box(-1.0, 1.0, (groups,), np.float32)

    def decode(self, action: Any, multipliers: Sequence[float]) -> tuple[float, ...]:
        """Return the multipliers of the next window; where the groups stand is not used."""
        return tuple(10.0 ** (BOX_DECADES / 2 * (float(a) - 1.0)) for a in action)


ACTIONS: dict[ActionName, type[GridAction] | type[RelativeAction] | type[BoxAction]] = {
    "grid": GridAction,
    "relative": RelativeAction,
    "box": BoxAction,
}


def grid_positions(multipliers: Sequence[float], grid: GridName) -> np.ndarray:
    """Position of each multiplier on the grid, -1 (lowest level) to 1 (highest), shape (G,).

    Between two levels the position is interpolated linearly in the multiplier.
    """
    levels = GRIDS[grid]
    return np.interp(multipliers, levels, np.linspace(-1.0, 1.0, len(levels)))


def grid_levels(positions: np.ndarray, grid: GridName) -> np.ndarray:
    """Index of the grid level nearest to each position of `grid_positions`, same shape."""
    return np.rint((positions + 1) / 2 * (len(GRIDS[grid]) - 1)).astype(np.int64)
