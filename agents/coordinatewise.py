"""The coordinate-wise policy network: one small LSTM, applied to every layer group."""

import torch
from torch import Tensor, nn

from agents.recurrent_policy import Layout

PLACE = 2  # inputs that say which group it is: relative depth, and whether it is the head


class CoordinatewiseNetwork(nn.Module):
    """One LSTM, one action head and one value head, shared by all layer groups.

    Every group's row goes through the same weights, with a state of its own: the entries that
    concern the whole network, the group's own entries, its relative depth (-1 at the input, 1 at
    the head) and whether it is the head. So the number of parameters does not depend on the
    number of groups, and a controller trained on 5 groups drives 7 or 30. The idea is that of
    coordinate-wise learned optimizers (Andrychowicz et al., "Learning to learn by gradient
    descent by gradient descent", NeurIPS 2016); theirs has a row per weight, ours one per group.
    The value of a state is read from the mean of the groups' rows.

    Args:
        layout: Which observation entries are shared, and which are each group's own.
        hidden_size: Of the LSTM.
        generator: Of the initial weights.
    """

    def __init__(self, layout: Layout, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        groups = len(layout.per_group)
        self.layout, self.hidden_size = layout, hidden_size
        self._own = torch.tensor(layout.per_group, dtype=torch.int64).reshape(groups, -1)
        depth = torch.linspace(-1, 1, groups) if groups > 1 else torch.ones(1)
        self._place = torch.stack((depth, (torch.arange(groups) == groups - 1).float()), dim=1)
        with torch.random.fork_rng(devices=[]):  # modules draw weights that are replaced below
            self.rnn = nn.LSTM(len(layout.shared) + self._own.shape[1] + PLACE, hidden_size)
            self.actor = nn.Linear(hidden_size, layout.actions)
            self.critic = nn.Linear(hidden_size, 1)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:  # near-uniform first actions
                gain = 0.01 if name.startswith("actor") else 1.0
                nn.init.orthogonal_(parameter, gain, generator=generator)

    def initial_state(self, rows: int) -> Tensor:
        """Return zeros, shape (2, rows, G * hidden): h, then c, groups side by side."""
        return torch.zeros(2, rows, len(self._own) * self.hidden_size)

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (T, B, G, M) and the new state; see `unroll`."""
        log_probs, _, state = self.unroll(observations, state)
        return log_probs, state

    def unroll(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run over a sequence.

        Args:
            observations: Shape (T, B, D).
            state: Shape (2, B, G * hidden).

        Returns:
            Log-probabilities of each group's choices, shape (T, B, G, M), values, shape (T, B),
            and the state after the last step.
        """
        steps, rows, groups = *observations.shape[:2], len(self._own)
        shared = observations[..., None, list(self.layout.shared)].expand(-1, -1, groups, -1)
        place = self._place.expand(steps, rows, groups, PLACE)
        inputs = torch.cat((shared, observations[..., self._own], place), dim=-1)
        hidden, cell = state.reshape(2, 1, rows * groups, self.hidden_size)
        output, (hidden, cell) = self.rnn(inputs.flatten(1, 2), (hidden, cell))
        output = output.unflatten(1, (rows, groups))
        log_probs = torch.log_softmax(self.actor(output), dim=-1)
        values = self.critic(output.mean(dim=2))[..., 0]
        return log_probs, values, torch.cat((hidden, cell)).reshape(state.shape)
