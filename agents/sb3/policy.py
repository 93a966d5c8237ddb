"""A trained SB3 network as a policy of ours."""

from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.sb3.algorithms import (
    Spaces,
    SpacesAlone,
    Statistics,
    build_network,
    frozen_normaliser,
)
from agents.sb3.settings import SB3Settings
from asg_env.core.seeding import numpy_generator


class SB3Policy:
    """A trained network as a policy: samples from a generator of its own.

    It has its own copy of the weights, and can be sent to worker processes.

    Args:
        both: Observation and action space.
        settings: Of the agent.
        weights: The network's state dict.
        statistics: Of observations, as they were when training stopped; {} for none.
    """

    def __init__(
        self,
        both: Spaces,
        settings: SB3Settings,
        weights: dict[str, np.ndarray],
        statistics: Statistics,
    ) -> None:
        self._arguments = (both, settings)
        self._statistics = {name: value.copy() for name, value in statistics.items()}
        self._normaliser = None
        if "obs_mean" in statistics:
            spaces_alone = DummyVecEnv([partial(SpacesAlone, *both)])
            self._normaliser = frozen_normaliser(self._statistics, spaces_alone)
        self._network = build_network(settings, both)
        self._network.load_state_dict(
            {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        )
        self.seed(0)

    def __reduce__(self) -> tuple[Any, ...]:
        weights = {name: value.numpy() for name, value in self._network.state_dict().items()}
        arguments = (*self._arguments, weights, self._statistics)
        return SB3Policy, arguments, {"_generator": self._generator}

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Choose an action.

        Args:
            observation: Shape (D,), as the environment gives it.
            state: None at the start of an episode. Of RecurrentPPO, hidden and cell state of the
                actor's LSTM, shape (1, 1, lstm_size) each; of the others None.
            episode_start: Where True, shape (1,), the state is put to zero.
            deterministic: Take the likeliest action instead of sampling. TD3 and ARS draw none
                either way.

        Returns:
            The action, of the action space, and the next state.
        """
        if self._normaliser is not None:
            normalised = self._normaliser.normalize_obs(observation)
            assert isinstance(normalised, np.ndarray)
            observation = normalised
        if deterministic:
            return self._network.predict(observation, state, episode_start, deterministic=True)
        with torch.random.fork_rng(devices=[]):  # SB3 samples from the global generator only
            torch.default_generator.manual_seed(int(self._generator.integers(2**63)))
            return self._network.predict(observation, state, episode_start)
