"""A policy at work: from the report of a window to the multipliers of the next."""

from typing import Any

import numpy as np

from agents.policy import Policy
from asg_env.actions import BoxAction, GridAction, RelativeAction
from asg_env.core.telemetry import Telemetry
from asg_env.observations import Observation


class LivePolicy:
    """Encodes windows as the environment does, asks the policy, and decodes what it chose.

    Args:
        policy: A trained one.
        observation: Encoding that it was trained with.
        action: Encoding that it was trained with.
        start: Multiplier of every layer group before the first decision.
        deterministic: Likeliest actions instead of drawn ones.

    Attributes:
        multipliers: Where each layer group stands, (G,).
        previous_ce: CE of the window before the last, nats.
        state: Of the policy; None at the start of a training.
    """

    def __init__(
        self,
        policy: Policy,
        observation: Observation,
        action: GridAction | RelativeAction | BoxAction,
        start: tuple[float, ...],
        deterministic: bool,
    ) -> None:
        self.policy, self._observation, self._action = policy, observation, action
        self._start, self._deterministic = start, deterministic
        self.multipliers = start
        self.needs_inner_valid = observation.needs_inner_valid

    def begin(self, initial: Telemetry) -> None:
        """Stand at the start of a training, whose first batches `initial` reports."""
        self.multipliers, self.previous_ce = self._start, initial.ce
        self.state: Any = None

    def decide(
        self, report: Telemetry, progress: float, inner_valid_loss: float, chance_loss: float
    ) -> tuple[float, ...]:
        """Return the multipliers of the coming window; arguments as `Observation.encode`."""
        observation = self._observation.encode(
            report, self.previous_ce, progress, self.multipliers, inner_valid_loss, chance_loss
        )
        self.previous_ce = report.ce
        action, self.state = self.policy.predict(
            observation, self.state, np.array([progress == 0]), deterministic=self._deterministic
        )
        self.multipliers = self._action.decode(action, self.multipliers)
        return self.multipliers
