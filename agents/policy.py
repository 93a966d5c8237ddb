"""What every agent can do: choose an action from an observation and a recurrent state."""

from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from asg_env.core.seeding import numpy_generator


class Policy(Protocol):
    """Stable-baselines3's `predict`, plus a seed for sampled actions.

    `state` is None at the start of an episode and is handed back as it came.
    """

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Return an action for one observation of shape (D,) and the next state."""
        ...

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        ...


class RandomPolicy:
    """Uniform random actions, from a generator of its own."""

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self._space = action_space
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "random-policy")

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Return a random action; there is no deterministic form, so the flag is refused.

        Raises:
            ValueError: `deterministic` is true.
        """
        if deterministic:
            raise ValueError("`deterministic` must be False for a random policy, got True")
        if isinstance(self._space, spaces.MultiDiscrete):
            return self._generator.integers(self._space.nvec), None
        assert isinstance(self._space, spaces.Box)
        return self._generator.uniform(self._space.low, self._space.high).astype(np.float32), None
