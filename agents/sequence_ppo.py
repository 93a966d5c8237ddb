"""PPO over whole sequences: a coordinate-wise recurrent policy, batches of complete episodes.

Recurrent PPO usually cuts rollouts at a fixed number of steps, stores the recurrent state of
every step and pads the pieces. Episodes here are short and end on their own, so each is kept whole
and starts from the zero state: one pass of the LSTM over (T, episodes) replaces all of that.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.episodic import (
    CHECKPOINT,
    Algorithm,
    Batch,
    EpisodicLearner,
    clipped_credit,
    costs_of,
    draw_instances,
    load_policy,
    metrics_of,
    rollout_jobs,
)
from agents.recurrent_policy import Layout, layout_of
from agents.rollout import Episode, RolloutPool, run_policy
from agents.warm_start import WarmStart, check_warm_start
from asg_env.config import EnvSettings
from asg_env.core.seeding import numpy_generator, torch_generator
from asg_env.instances import InstanceSet
from asg_env.validation import Settings

__all__ = ["CHECKPOINT", "Learner", "SequencePPOSettings", "load_policy"]


class SequencePPOSettings(Settings):
    """`agent:` of an experiment file, for `kind: sequence-ppo`."""

    kind: Literal["sequence-ppo"] = "sequence-ppo"
    updates: Annotated[int, Field(ge=1)] = 30
    episodes_per_update: Annotated[int, Field(ge=2)] = 32  # of an instance each
    warm_start_episodes: Annotated[int, Field(ge=0)] = 0  # besides those of updates; 0: none
    hidden_size: Annotated[int, Field(ge=1)] = 32
    policy_lr: Annotated[float, Field(gt=0)] = 0.01
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    entropy: Annotated[float, Field(ge=0)] = 0.002  # bonus per nat of a layer group's choice
    value_weight: Annotated[float, Field(ge=0)] = 0.5  # of the squared error of values
    passes: Annotated[int, Field(ge=1)] = 4
    episodes_per_minibatch: Annotated[int, Field(ge=2)] = 16
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.5

    @model_validator(mode="after")
    def _check_combinations(self) -> "SequencePPOSettings":
        check_warm_start(self.warm_start_episodes)
        if self.episodes_per_update % self.episodes_per_minibatch:
            raise ValueError(
                f"`episodes_per_minibatch` must divide episodes_per_update "
                f"({self.episodes_per_update}), got {self.episodes_per_minibatch}; change one"
            )
        return self

    @property
    def episodes(self) -> int:
        """Training episodes in all, those of a warm start included."""
        return self.warm_start_episodes + self.updates * self.episodes_per_update


def generalised_advantages(
    rewards: Sequence[np.ndarray], values: np.ndarray, discount: float, gae_lambda: float
) -> np.ndarray:
    """Generalised advantage estimates of complete episodes, padded with zeros.

    delta_t = r_t + discount * V_{t+1} - V_t and A_t = delta_t + discount * lambda * A_{t+1}, with
    V = 0 after the end: every episode terminates. Source: Schulman et al., "High-Dimensional
    Continuous Control Using Generalized Advantage Estimation" (2016), eq. 16.

    Args:
        rewards: Of each episode, shape (T_e,).
        values: V at each step, shape (T, E).
        discount: Per env step.
        gae_lambda: 0: one-step differences; 1: returns less V.

    Returns:
        Shape (T, E).
    """
    result = np.zeros(values.shape)
    for column, row in enumerate(rewards):
        following, advantage = 0.0, 0.0
        for t in reversed(range(len(row))):
            value = values[t, column]
            delta = row[t] + discount * following - value
            result[t, column] = advantage = delta + discount * gae_lambda * advantage
            following = value
    return result


class SequencePPO(Algorithm):
    """The update rule, and the policy that it trains."""

    def __init__(self, layout: Layout, settings: SequencePPOSettings, seed: int) -> None:
        self.settings, self._seed = settings, seed
        generator = torch_generator(seed, "policy")
        network = CoordinatewiseNetwork(layout, settings.hidden_size, generator)
        super().__init__(network, settings.policy_lr, eps=1e-5, trains_values=True)

    def update(self, episodes: Sequence[Episode], update: int) -> dict[str, float]:
        """Take the update's gradient steps on a batch of rollouts.

        loss = -mean clipped credit + value_weight * mean squared error of the values
               - entropy * sum over groups of the mean entropy,

        means over the env steps of a minibatch of whole episodes; advantages have mean 0 and
        standard deviation 1 over the batch.

        Returns:
            Entropy [nats per group], value loss and gradient norm before clipping, each the mean
            over the minibatches of the last pass.
        """
        settings = self.settings
        batch = Batch.of(episodes)
        with torch.no_grad():
            log_probs, values, _ = self._unroll(batch)
            before = batch.joint_log_prob(log_probs)
        raw = generalised_advantages(
            [episode.rewards for episode in episodes],
            values.double().numpy(),
            settings.discount,
            settings.gae_lambda,
        )
        there = batch.running.numpy() > 0
        targets = torch.from_numpy(raw).float() + values
        advantage = torch.from_numpy((raw - raw[there].mean()) / (raw[there].std() + 1e-8)).float()
        groups = batch.actions.shape[-1]
        generator = numpy_generator(self._seed, "minibatches", update)
        seen: list[tuple[float, float, float]] = []
        for _ in range(settings.passes):
            order = torch.from_numpy(generator.permutation(len(episodes)))
            seen = []
            for index in order.split(settings.episodes_per_minibatch):
                part = batch.columns(index)
                log_probs, values, _ = self._unroll(part)
                ratio = part.joint_log_prob(log_probs) - before[:, index]
                credit = clipped_credit(ratio, advantage[:, index], settings.clip_ratio)
                error = part.mean((values - targets[:, index]) ** 2)
                entropy = part.mean_entropy(log_probs)
                loss = -part.mean(credit) + settings.value_weight * error
                loss = loss - settings.entropy * groups * entropy
                self._optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
                self._optimizer.step()
                seen.append((entropy.item(), error.item(), norm.item()))
        means = np.mean(seen, axis=0).tolist()
        return dict(zip(("entropy", "value_loss", "grad_norm"), means, strict=True))

    def _unroll(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        count = batch.running.shape[1]
        network = cast(CoordinatewiseNetwork, self._network)
        return network.unroll(batch.observations, network.initial_state(count))

    def train(
        self, pool: RolloutPool, task: str, instances: InstanceSet, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics.

        Every draw is derived from (seed, update, episode), so that an interrupted training goes
        on as if it had not been interrupted.
        """
        for update in range(start, self.settings.updates):
            count = self.settings.episodes_per_update
            drawn = draw_instances(self._seed, update, task, instances, count)
            jobs = rollout_jobs(self.policy, self._seed, update, drawn, rollouts=1)
            episodes: list[Episode] = list(pool.map(run_policy, jobs))
            statistics = self.update(episodes, update)
            yield update, metrics_of(episodes, update * count) | statistics | costs_of(episodes)


class Learner(EpisodicLearner):
    """Whole-sequence PPO as `asg train` drives it."""

    def __init__(
        self, task: str, env: EnvSettings, settings: SequencePPOSettings, seed: int, workers: int
    ) -> None:
        algorithm = SequencePPO(layout_of(task, env), settings, seed)
        budget = settings.warm_start_episodes
        warm_start = WarmStart(task, env, budget, seed, workers) if budget else None
        super().__init__(task, env, algorithm, settings.updates, workers, warm_start)
