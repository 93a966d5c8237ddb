"""Hand-made controllers: from instance and telemetry to exact multipliers.

Each has a line of the field behind it; `FAMILIES` lists the candidates among which each is
tuned, on train instances. All set the layer groups directly, whatever the agent's encoding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asg_env.core.telemetry import Telemetry
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance

LEVELS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # candidates of every "top" multiplier


class Controller(Protocol):
    """Sets the multipliers of each window; one object serves many episodes, one at a time."""

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start an episode; the trainer stands at inner step 0 and may be read."""
        ...

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the multipliers of the next window, shape (G,).

        Args:
            progress: Share of the inner steps that is over.
            telemetry: Report of the last window; None before the first.
        """
        ...


@dataclass
class Static:
    """The same vector in every window."""

    vector: tuple[float, ...]

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Check that the vector fits the layer groups."""
        groups = len(trainer.layer_groups)
        if len(self.vector) != groups:
            raise ValueError(f"a static vector needs {groups} multipliers, got {self.vector}")

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the vector."""
        return self.vector


@dataclass
class KnownScale:
    """Reference line: a static vector divided by the instance's hidden scale.

    No controller has this knowledge. With `clip` the multipliers stay within the grid's range,
    as an agent's do.
    """

    vector: tuple[float, ...]
    clip: bool

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Read the hidden scale."""
        self._now = [m / instance.base_lr_scale for m in self.vector]
        if self.clip:
            self._now = [min(m, 1.0) for m in self._now]

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the rescaled vector."""
        return self._now


@dataclass
class Cosine:
    """Cosine annealing from `top` to 0, the same for every group."""

    top: float

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Remember the number of groups."""
        self._groups = len(trainer.layer_groups)

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return top * (1 + cos(pi * progress)) / 2 for every group."""
        return [self.top * (1 + math.cos(math.pi * progress)) / 2] * self._groups


@dataclass
class ReduceOnPlateau:
    """Divide a uniform multiplier by 3 when the training loss has not fallen for two windows."""

    top: float
    patience: int = 1  # windows
    threshold: float = 0.01  # relative fall that counts as one

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start at the top."""
        self._groups, self._now = len(trainer.layer_groups), self.top
        self._best, self._waited = math.inf, 0

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Compare the last window's objective with the best so far."""
        if telemetry is not None:
            if telemetry.objective < self._best * (1 - self.threshold):
                self._best, self._waited = telemetry.objective, 0
            else:
                self._waited += 1
            if self._waited > self.patience:
                self._now, self._waited = self._now / 3, 0
        return [self._now] * self._groups


@dataclass
class BackOff:
    """Raise a uniform multiplier every window until the loss rises, then step back and hold.

    A rule of thumb for an unknown scale: the first rate at which the training objective rose,
    divided by `back`.
    """

    start: float
    raise_by: float = 3.0
    back: float = 10.0
    _rising: bool = field(default=True, init=False)

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start low."""
        self._groups, self._now = len(trainer.layer_groups), self.start
        self._previous, self._rising = math.inf, True

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Raise, step back once, or hold."""
        if telemetry is not None and self._rising:
            if telemetry.objective > self._previous:
                self._now, self._rising = self._now / self.back, False
            else:
                self._previous = telemetry.objective
                self._now = min(self._now * self.raise_by, 1.0)
        return [self._now] * self._groups


def uniform(top: float, groups: int) -> Static:
    """One constant rate for the whole network."""
    return Static((top,) * groups)


def small_backbone(top: float, groups: int) -> Static:
    """The head at `top`, the backbone at a tenth of it: ASG's hand-made setting."""
    return Static((top / 10,) * (groups - 1) + (top,))


def frozen_backbone(top: float, groups: int) -> Static:
    """Only the head trains."""
    return Static((0.0,) * (groups - 1) + (top,))


def layer_decay(top: float, decay: float, groups: int) -> Static:
    """Layer-wise decay towards the input: group g of G at top * decay**(G - 1 - g)."""
    return Static(tuple(top * decay ** (groups - 1 - g) for g in range(groups)))


# Family name -> its candidates, given the number of layer groups.
FAMILIES: dict[str, Callable[[int], dict[str, Controller]]] = {
    "uniform": lambda groups: {f"{m:g}": uniform(m, groups) for m in LEVELS},
    "small-backbone": lambda groups: {f"{m:g}": small_backbone(m, groups) for m in LEVELS},
    "frozen-backbone": lambda groups: {f"{m:g}": frozen_backbone(m, groups) for m in LEVELS},
    "layer-decay": lambda groups: {
        f"{m:g} x {d}^k": layer_decay(m, d, groups) for m in LEVELS for d in (0.3, 0.65)
    },
    "cosine": lambda groups: {f"{m:g}": Cosine(m) for m in LEVELS},
    "plateau": lambda groups: {f"{m:g}": ReduceOnPlateau(m) for m in LEVELS},
    "back-off": lambda groups: {
        f"{m:g} / {b:g}": BackOff(m, back=b) for m in (0.003, 0.01) for b in (3.0, 10.0, 30.0)
    },
}
