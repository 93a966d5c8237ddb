"""What recurrent policies share: the layout of their inputs, and acting with a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from torch import Tensor

from agents.numpy_policy import NumpyPolicy, choose, split_labels
from asg_env.actions import ACTIONS, BoxAction, GridAction, RelativeAction
from asg_env.build import task_of
from asg_env.config import EnvSettings
from asg_env.core.seeding import numpy_generator
from asg_env.observations import Observation
from asg_env.validation import ConfigError


@dataclass(frozen=True)
class Layout:
    """Which observation entries are shared and which belong to a layer group.

    Attributes:
        shared: Indices of entries that concern the whole network, each with its own LSTM.
        per_group: Indices of each group's own entries, which its action head sees directly.
        actions: Number of choices per group.
    """

    shared: tuple[int, ...]
    per_group: tuple[tuple[int, ...], ...]
    actions: int

    @property
    def width(self) -> int:
        """Entries of an observation, D."""
        return len(self.shared) + sum(map(len, self.per_group))

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        layer_groups: Sequence[str],
        action: GridAction | RelativeAction | BoxAction,
    ) -> "Layout":
        """Read the layout off an environment's labels and action encoding.

        Raises:
            ConfigError: The action space is not `MultiDiscrete`.
        """
        if not isinstance(action.space, spaces.MultiDiscrete):
            raise ConfigError(
                "`env.action` must be grid or relative for this agent, got box; "
                "set agent=ppo for box actions"
            )
        return cls(*split_labels(labels, layer_groups), actions=int(action.space.nvec[0]))


class RecurrentNetwork(Protocol):
    """A network that chooses for every layer group, from a sequence of observations.

    Attributes:
        kind: What `agents.numpy_policy` calls it.
        layout: Of its observations.
        memoryless: Whether every step starts from zeros.
    """

    kind: str
    layout: Layout
    memoryless: bool

    def initial_state(self, rows: int) -> Tensor:
        """Return zeros, shape (2, rows, W): h, then c."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return its weights."""
        ...

    def __call__(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and the state after the last step.

        Args:
            observations: Shape (T, B, D).
            state: Shape (2, B, W).

        Returns:
            Log-probabilities of each group's choices, shape (T, B, G, M), and the new state.
        """
        ...


class RecurrentPolicy:
    """The network as a policy: carries the recurrent state, samples from its own generator.

    It acts in NumPy, on the weights that the network has when an episode starts.
    """

    def __init__(self, network: RecurrentNetwork) -> None:
        self.network = network
        self._acting: NumpyPolicy | None = None
        self.seed(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_acting": None}  # made anew where it is sent

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

    def generator_state(self) -> dict[str, Any]:
        """Return where the draws stand, as plain values."""
        return dict(self._generator.bit_generator.state)

    def load_generator_state(self, state: dict[str, Any]) -> None:
        """Go on with the draws from a `generator_state`."""
        self._generator.bit_generator.state = state

    def predict(
        self,
        observation: np.ndarray,
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Choose actions, as stable-baselines3's `predict` does.

        Rows go through the network one at a time, because bits change with the batch size.

        Args:
            observation: Shape (D,) or (N, D).
            state: Recurrent state as returned before, shape (N, 2, W), or None.
            episode_start: Shape (N,), bool: rows whose state starts from zero.
            deterministic: Take each group's most likely choice instead of sampling.

        Returns:
            Actions of shape (G,) or (N, G), int64, and the next state.

        Raises:
            ValueError: Observations are of another width than those that the network learned from.
        """
        one = np.ndim(observation) == 1
        rows, width = observation[None] if one else observation, self.network.layout.width
        if rows.shape[1] != width:
            raise ValueError(f"observations must have {width} entries, got {rows.shape[1]}")
        starts = [state is None] * len(rows) if episode_start is None else list(episode_start)
        if self._acting is None or state is None or any(starts):
            self._acting = self._in_numpy()
        generator = None if deterministic else self._generator
        actions, states = [], []
        for index, row in enumerate(rows):
            before = None if state is None or starts[index] else state[index]
            probabilities, after = self._acting.step(row, before)
            actions.append(choose(probabilities, generator))
            states.append(after)
        if one:  # the usual case, and stacking takes its time
            return actions[0], states[0][None]
        return np.stack(actions), np.stack(states)

    def _in_numpy(self) -> NumpyPolicy:
        network, layout = self.network, self.network.layout
        weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        return NumpyPolicy(
            weights,
            {
                "kind": network.kind,
                "shared": layout.shared,
                "per_group": layout.per_group,
                "memoryless": network.memoryless,
            },
        )


def layout_of(task: str, env: EnvSettings) -> Layout:
    """Layout of an environment's observations and actions, read without training anything."""
    groups = tuple(task_of(task, env).layer_groups)
    labels = Observation(env.observation, groups, env.grid, env.further_terms()).labels
    return Layout.of(labels, groups, ACTIONS[env.action](env.grid, len(groups)))
