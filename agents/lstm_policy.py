"""The LSTM policy network: one LSTM per scalar feature, one action head per layer group.

The network is the one of ASG (docs/original.md, section 2); `agents.reinforce` trains it.
"""

from typing import cast

import torch
from torch import Tensor, nn

from agents.recurrent_policy import Layout


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

    kind = "per-feature"

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
