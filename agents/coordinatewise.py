"""The coordinate-wise policy network: one small LSTM, applied to every layer group."""

import torch
from torch import Tensor, nn

from agents.recurrent_policy import Layout

PLACE = 3  # inputs that say which group it is: relative depth, whether it is the first, the head


class CoordinatewiseNetwork(nn.Module):
    """One LSTM, one action head and one value head, shared by all layer groups.

    Every group's row goes through the same weights, with a state of its own: the entries that
    concern the whole network, the group's own entries, its relative depth (-1 at the input, 1 at
    the head), and whether it is the first or the head. The heads see the row beside the state of
    the LSTM. So the number of parameters does not depend on the number of groups, and a controller
    trained on 5 groups drives 7 or 30. The idea is that of
    coordinate-wise learned optimizers (Andrychowicz et al., "Learning to learn by gradient
    descent by gradient descent", NeurIPS 2016); theirs has a row per weight, ours one per group.
    The value of a state is read from the mean of the groups' rows.

    Args:
        layout: Which observation entries are shared, and which are each group's own.
        hidden_size: Of the LSTM.
        generator: Of the initial weights.
    """

    kind, memoryless = "coordinate-wise", False

    def __init__(self, layout: Layout, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        groups = len(layout.per_group)
        self.layout, self.hidden_size = layout, hidden_size
        entries = [(*layout.shared, *own) for own in layout.per_group]
        self._entries = torch.tensor(entries, dtype=torch.int64)  # of each group's row
        depth = torch.linspace(-1, 1, groups) if groups > 1 else torch.ones(1)
        number = torch.arange(groups)
        ends = (number == 0).float(), (number == groups - 1).float()
        self._place = torch.stack((depth, *ends), dim=1)
        inputs = self._entries.shape[1] + PLACE
        with torch.random.fork_rng(devices=[]):  # modules draw weights that are replaced below
            self.rnn = nn.LSTM(inputs, hidden_size)
            self.actor = nn.Linear(inputs + hidden_size, layout.actions)
            self.critic = nn.Linear(inputs + hidden_size, 1)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:  # near-uniform first actions
                gain = 0.01 if name.startswith("actor") else 1.0
                nn.init.orthogonal_(parameter, gain, generator=generator)

    def initial_state(self, rows: int) -> Tensor:
        """Return zeros, shape (2, rows, G * hidden): h, then c, groups side by side."""
        return torch.zeros(2, rows, len(self._entries) * self.hidden_size)

    def forward(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (T, B, G, M) and the new state; see `unroll`."""
        known, state = self._recur(observations, state)
        return torch.log_softmax(self.actor(known), dim=-1), state

    def unroll(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run over a sequence.

        Args:
            observations: Shape (T, B, D).
            state: Shape (2, B, G * hidden).

        Returns:
            Log-probabilities of each group's choices, shape (T, B, G, M), values, shape (T, B),
            and the state after the last step.
        """
        known, state = self._recur(observations, state)
        log_probs = torch.log_softmax(self.actor(known), dim=-1)
        return log_probs, self.critic(known.mean(dim=2))[..., 0], state

    def _recur(self, observations: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's row beside the LSTM's output, (T, B, G, .), and the new state."""
        steps, rows, groups = *observations.shape[:2], len(self._entries)
        place = self._place.expand(steps, rows, groups, PLACE)
        seen = torch.cat((observations[..., self._entries], place), dim=-1)
        hidden, cell = state.reshape(2, 1, rows * groups, self.hidden_size)
        output, (hidden, cell) = self.rnn(seen.flatten(1, 2), (hidden, cell))
        after = torch.cat((hidden, cell)).reshape(state.shape)
        return torch.cat((seen, output.unflatten(1, (rows, groups))), dim=-1), after
