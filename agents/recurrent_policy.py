"""What recurrent policies share: the layout of their inputs, and acting with a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

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
        return cls(
            shared=tuple(i for i, label in enumerate(labels) if "/" not in label),
            per_group=tuple(
                tuple(i for i, label in enumerate(labels) if label.endswith(f"/{group}"))
                for group in layer_groups
            ),
            actions=int(action.space.nvec[0]),
        )


class RecurrentNetwork(Protocol):
    """A network that chooses for every layer group, from a sequence of observations."""

    layout: Layout

    def initial_state(self, rows: int) -> Tensor:
        """Return zeros, shape (2, rows, W): h, then c."""
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
    """The network as a policy: carries the recurrent state, samples from its own generator."""

    def __init__(self, network: RecurrentNetwork) -> None:
        self.network = network
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

    def _step(self, row: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (G, M) and the next state, of a row (D,) and its state (2, W).

        Through the network's own `step`, if it has one that is faster than a pass.
        """
        step = getattr(self.network, "step", None)
        if step is not None:
            return cast(tuple[np.ndarray, np.ndarray], step(row, state))
        with torch.inference_mode():
            log_probs, after = self.network(
                torch.from_numpy(row)[None, None], torch.from_numpy(state)[:, None]
            )
            return log_probs[0, 0].double().exp().numpy(), after[:, 0].numpy()

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
        rows, width = np.atleast_2d(observation), self.network.layout.width
        if rows.shape[1] != width:
            raise ValueError(f"observations must have {width} entries, got {rows.shape[1]}")
        if state is None:
            state = np.stack([self.network.initial_state(1)[:, 0].numpy()] * len(rows))
        if episode_start is not None:
            state = state * ~np.asarray(episode_start, dtype=bool)[:, None, None]
        actions, states = [], []
        for row, row_state in zip(rows, state, strict=True):
            probabilities, after = self._step(
                np.ascontiguousarray(row, np.float32), np.ascontiguousarray(row_state, np.float32)
            )
            if deterministic:
                actions.append(probabilities.argmax(axis=1))
            else:
                draws = self._generator.random(len(probabilities))
                cumulative = probabilities.cumsum(axis=1)
                chosen = (cumulative < draws[:, None] * cumulative[:, -1:]).sum(axis=1)
                actions.append(chosen)
            states.append(after)
        action = np.stack(actions)
        return (action[0] if np.ndim(observation) == 1 else action), np.stack(states)


def layout_of(task: str, env: EnvSettings) -> Layout:
    """Layout of an environment's observations and actions, read without training anything."""
    groups = tuple(task_of(task, env).layer_groups)
    labels = Observation(env.observation, groups, env.grid, env.further_terms()).labels
    return Layout.of(labels, groups, ACTIONS[env.action](env.grid, len(groups)))
