"""The LSTM policy: one LSTM per scalar feature, one action head per layer group.

The network is the one of ASG (docs/original.md, section 2); `agents.reinforce` trains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from asg_env.actions import ACTIONS, BoxAction, GridAction, RelativeAction
from asg_env.config import ConfigError, EnvSettings
from asg_env.core.seeding import numpy_generator
from asg_env.env import task_of
from asg_env.observations import Observation


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
                "`env.action` must be grid or relative for the agent reinforce, got box; "
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


class _StateEncoder(nn.Module):
    """The LSTM of one scalar feature."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, hidden_size)


class LSTMPolicyNetwork(nn.Module):
    """Scalar features -> one LSTM each -> one linear head per layer group.

    The value head is never trained or read; like the names of all parameters it is kept so that
    a state dict of the original's policy fits (docs/original.md, section 2).

    Args:
        layout: Which observation entries go where.
        hidden_size: Of each LSTM.
        generator: Of the first weights.
        memoryless: Start from zeros at every step, as the original's policy did when it acted.
    """

    def __init__(
        self,
        layout: Layout,
        hidden_size: int,
        generator: torch.Generator,
        memoryless: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.hidden_size, self.memoryless = layout, hidden_size, memoryless
        width = len(layout.shared) * hidden_size
        inputs = [width + len(own) for own in layout.per_group]
        with torch.random.fork_rng(devices=[]):  # modules draw weights that are replaced below
            self.net = nn.Module()
            self.net.state_encoder = nn.ModuleList(
                _StateEncoder(hidden_size) for _ in layout.shared
            )
            self.action_distribution = nn.Module()
            self.action_distribution.linear = nn.ModuleList(
                nn.Linear(size, layout.actions) for size in inputs
            )
            self.critic = nn.Module()
            self.critic.fc = nn.Linear(sum(inputs), 1)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:  # near-uniform first actions
                gain = 0.01 if name.startswith("action_distribution") else 1.0
                nn.init.orthogonal_(parameter, gain, generator=generator)

    def initial_state(self, rows: int) -> Tensor:
        """Return zeros, shape (2, rows, F * hidden): h, then c, features side by side."""
        return torch.zeros(2, rows, len(self.layout.shared) * self.hidden_size)

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and the state after the last step.

        Args:
            observations: Shape (T, B, D).
            state: Shape (2, B, F * hidden).

        Returns:
            Log-probabilities of each group's choices, shape (T, B, G, M), and the new state:
            zeros if memoryless, which `state` is then not read for either.
        """
        if not self.memoryless:
            return self._recur(observations, state)
        # T steps of B rows as one step of T * B rows: none sees what came before it.
        alone = observations.flatten(0, 1)[None]
        log_probs, _ = self._recur(alone, self.initial_state(alone.shape[1]))
        return log_probs[0].unflatten(0, observations.shape[:2]), torch.zeros_like(state)

    def _recur(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        features, states = [], []
        encoders = cast(nn.ModuleList, self.net.state_encoder)
        heads = cast(nn.ModuleList, self.action_distribution.linear)
        for index, (column, encoder) in enumerate(zip(self.layout.shared, encoders, strict=True)):
            own = slice(index * self.hidden_size, (index + 1) * self.hidden_size)
            hidden, cell = (part[None, :, own].contiguous() for part in state)
            output, (hidden, cell) = cast(_StateEncoder, encoder).rnn(
                observations[..., column, None], (hidden, cell)
            )
            features.append(output)
            states.append(torch.cat((hidden, cell)))
        logits = [
            head(torch.cat((*features, observations[..., list(own_columns)]), dim=-1))
            for own_columns, head in zip(self.layout.per_group, heads, strict=True)
        ]
        return torch.log_softmax(torch.stack(logits, dim=-2), dim=-1), torch.cat(states, dim=-1)


class ReinforcePolicy:
    """The network as a policy: carries the recurrent state, samples from its own generator."""

    def __init__(self, network: LSTMPolicyNetwork) -> None:
        self.network = network
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

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
            state: Recurrent state as returned before, shape (N, 2, F * hidden), or None.
            episode_start: Shape (N,), bool: rows whose state starts from zero.
            deterministic: Take each group's most likely choice instead of sampling.

        Returns:
            Actions of shape (G,) or (N, G), int64, and the next state.
        """
        rows = np.atleast_2d(observation)
        if state is None:
            state = np.stack([self.network.initial_state(1)[:, 0].numpy()] * len(rows))
        if episode_start is not None:
            state = state * ~np.asarray(episode_start, dtype=bool)[:, None, None]
        actions, states = [], []
        for row, row_state in zip(rows, state, strict=True):
            with torch.no_grad():
                log_probs, after = self.network(
                    torch.from_numpy(np.ascontiguousarray(row, np.float32))[None, None],
                    torch.from_numpy(np.ascontiguousarray(row_state, np.float32))[:, None],
                )
            probabilities = log_probs[0, 0].double().exp().numpy()  # (G, M)
            if deterministic:
                actions.append(probabilities.argmax(axis=1))
            else:
                draws = self._generator.random(len(probabilities))
                cumulative = probabilities.cumsum(axis=1)
                chosen = (cumulative < draws[:, None] * cumulative[:, -1:]).sum(axis=1)
                actions.append(chosen)
            states.append(after[:, 0].numpy())
        action = np.stack(actions)
        return (action[0] if np.ndim(observation) == 1 else action), np.stack(states)


def layout_of(task: str, env: EnvSettings) -> Layout:
    """Layout of an environment's observations and actions, read without training anything."""
    groups = tuple(task_of(task, env).layer_groups)
    labels = Observation(env.observation, groups, env.grid, env.further_terms()).labels
    return Layout.of(labels, groups, ACTIONS[env.action](env.grid, len(groups)))
