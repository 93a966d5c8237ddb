"""An evolution strategy on the weights of a coordinate-wise policy.

Source: Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"
(2017): antithetic Gaussian perturbations, centred ranks, Adam. Ours ranks the candidates on each
training instance apart and then averages, so that an easy instance outweighs no other.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.episodic import (
    CHECKPOINT,
    Algorithm,
    EpisodicLearner,
    costs_of,
    draw_instances,
    load_policy,
    metrics_of,
)
from agents.recurrent_policy import Layout, RecurrentPolicy, layout_of
from agents.rollout import Episode, RolloutPool, run_policy
from asg_env.config import EnvSettings
from asg_env.core.seeding import torch_generator
from asg_env.instances import InstanceSet
from asg_env.validation import Settings

__all__ = ["CHECKPOINT", "EvolutionSettings", "Learner", "load_policy"]


class EvolutionSettings(Settings):
    """`agent:` of an experiment file, for `kind: es`."""

    kind: Literal["es"] = "es"
    updates: Annotated[int, Field(ge=1)] = 30
    population: Annotated[int, Field(ge=2)] = 16  # candidates, in antithetic pairs
    instances_per_update: Annotated[int, Field(ge=1)] = 2  # an episode of each per candidate
    hidden_size: Annotated[int, Field(ge=1)] = 8
    policy_lr: Annotated[float, Field(gt=0)] = 0.05
    noise: Annotated[float, Field(gt=0)] = 0.1  # standard deviation of perturbations

    @model_validator(mode="after")
    def _check_combinations(self) -> "EvolutionSettings":
        if self.population % 2:
            raise ValueError(f"`population` must be even, got {self.population}; add 1")
        return self

    @property
    def episodes_per_update(self) -> int:
        """Training episodes of one update."""
        return self.population * self.instances_per_update

    @property
    def episodes(self) -> int:
        """Training episodes in all."""
        return self.updates * self.episodes_per_update


def centred_ranks(returns: np.ndarray) -> np.ndarray:
    """Ranks within each row, from -0.5 to 0.5; equal returns share their mean rank.

    Args:
        returns: Shape (I, P), of P candidates on I instances; P at least 2.
    """
    ranks = np.empty(returns.shape)
    for row, values in zip(ranks, returns, strict=True):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts) - 1
        row[:] = (last - (counts - 1) / 2)[inverse]
    return np.asarray(ranks / (returns.shape[1] - 1) - 0.5)


class EvolutionStrategy(Algorithm):
    """The update rule, and the policy that it trains: the one without perturbation."""

    def __init__(self, layout: Layout, settings: EvolutionSettings, seed: int) -> None:
        self.settings, self._seed = settings, seed
        generator = torch_generator(seed, "policy")
        network = CoordinatewiseNetwork(layout, settings.hidden_size, generator)
        super().__init__(network, settings.policy_lr)

    def perturbations(self, update: int) -> Tensor:
        """Draw the update's noise, shape (P / 2, N), for the positive half of each pair."""
        size = sum(p.numel() for p in self._parameters)
        generator = torch_generator(self._seed, "perturbations", update)
        return torch.randn(self.settings.population // 2, size, generator=generator)

    def candidates(self, noise: Tensor) -> list[RecurrentPolicy]:
        """Return the perturbed policies: every positive one, then every negative one."""
        made = []
        centre = nn.utils.parameters_to_vector(self._parameters).detach()
        for row in torch.cat((noise, -noise)):
            policy = copy.deepcopy(self.policy)
            assert isinstance(policy.network, nn.Module)
            weights = [
                p for n, p in policy.network.named_parameters() if not n.startswith("critic")
            ]
            nn.utils.vector_to_parameters(centre + self.settings.noise * row, weights)
            made.append(policy)
        return made

    def update(self, episodes: Sequence[Episode], noise: Tensor) -> dict[str, float]:
        """Step along the estimated gradient of the mean rank.

        g = 1 / (P sigma) * sum over candidates of rank * noise, as antithetic pairs.

        Args:
            episodes: Candidate by candidate, an episode of each instance.
            noise: What `perturbations` returned.

        Returns:
            Norm of the gradient estimate; entropy is 0, as candidates act greedily.
        """
        settings = self.settings
        returns = np.array([episode.rewards.sum() for episode in episodes])
        ranks = centred_ranks(returns.reshape(settings.population, -1).T).mean(axis=0)
        pairs = len(noise)
        weights = torch.from_numpy(ranks[:pairs] - ranks[pairs:]).float()
        gradient = weights @ noise / (settings.population * settings.noise)
        self._optimizer.zero_grad()
        start = 0
        for parameter in self._parameters:
            part = gradient[start : start + parameter.numel()]
            parameter.grad = -part.view_as(parameter)
            start += parameter.numel()
        self._optimizer.step()
        return {"entropy": 0.0, "grad_norm": float(gradient.norm())}

    def train(
        self, pool: RolloutPool, task: str, instances: InstanceSet, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics.

        All candidates of an update train the same instances, so that they can be ranked.
        """
        settings = self.settings
        for update in range(start, settings.updates):
            drawn = draw_instances(
                self._seed, update, task, instances, settings.instances_per_update
            )
            noise = self.perturbations(update)
            jobs = [
                (policy, instance, 0, True)
                for policy in self.candidates(noise)
                for instance in drawn
            ]
            episodes: list[Episode] = list(pool.map(run_policy, jobs))
            statistics = self.update(episodes, noise)
            before = update * settings.episodes_per_update
            yield update, metrics_of(episodes, before) | statistics | costs_of(episodes)


class Learner(EpisodicLearner):
    """The evolution strategy as `asg train` drives it."""

    def __init__(
        self, task: str, env: EnvSettings, settings: EvolutionSettings, seed: int, workers: int
    ) -> None:
        algorithm = EvolutionStrategy(layout_of(task, env), settings, seed)
        super().__init__(task, env, algorithm, settings.updates, workers)
