"""REINFORCE with a recurrent policy over the layer groups.

The network is the one of ASG, with an LSTM per feature and an action head per layer group
(`agents.lstm_policy`), or a coordinate-wise one. What the original lacked is here: every step has
its own credit, the baseline is the mean over rollouts of the same instance, the recurrent state is
carried through the episode unless `memoryless` says otherwise, and entropy bonus and gradients are
bounded.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.episodic import (
    CHECKPOINT,
    Algorithm,
    Batch,
    EpisodicLearner,
    PolicyNetwork,
    clipped_credit,
    costs_of,
    draw_instances,
    load_policy,
    metrics_of,
    rollout_jobs,
)
from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import Layout, layout_of
from agents.rollout import Episode, RolloutPool, run_policy
from agents.warm_start import WarmStart, check_warm_start
from asg_env.config import EnvSettings
from asg_env.core.seeding import torch_generator
from asg_env.instances import InstanceSet
from asg_env.validation import Settings

__all__ = ["CHECKPOINT", "Learner", "ReinforceSettings", "load_policy"]


class ReinforceSettings(Settings):
    """`agent:` of an experiment file, for `kind: reinforce`."""

    kind: Literal["reinforce"] = "reinforce"
    updates: Annotated[int, Field(ge=1)] = 30
    instances_per_update: Annotated[int, Field(ge=1)] = 4
    rollouts_per_instance: Annotated[int, Field(ge=2)] = 8
    network: Literal["per-feature", "coordinate-wise"] = "per-feature"
    hidden_size: Annotated[int, Field(ge=1)] = 20
    memoryless: bool = False  # every step from a zero state, as the original acted
    policy_lr: Annotated[float, Field(gt=0)] = 0.01
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    entropy_start: Annotated[float, Field(ge=0)] = 0.01  # bonus per nat, first update
    entropy_end: Annotated[float, Field(ge=0)] = 0.0  # bonus per nat, last update
    warm_start_episodes: Annotated[int, Field(ge=0)] = 0  # besides those of updates; 0: none
    passes: Annotated[int, Field(ge=1)] = 4  # gradient steps on each batch of rollouts
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2  # of the probability ratio, from 2 passes on
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check_combinations(self) -> "ReinforceSettings":
        check_warm_start(self.warm_start_episodes)
        if self.memoryless and self.network != "per-feature":
            raise ValueError(
                f"`memoryless` must be false with network {self.network}, got true; leave it out"
            )
        return self

    @property
    def episodes_per_update(self) -> int:
        """Training episodes of one update."""
        return self.instances_per_update * self.rollouts_per_instance

    @property
    def episodes(self) -> int:
        """Training episodes in all, those of a warm start included."""
        return self.warm_start_episodes + self.updates * self.episodes_per_update


def returns_to_go(rewards: np.ndarray, discount: float) -> np.ndarray:
    """R_t = r_t + discount * R_{t+1}, shape (T,)."""
    returns = np.zeros(len(rewards))
    total = 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = total = rewards[t] + discount * total
    return returns


def advantages(episodes: Sequence[Episode], rollouts: int, discount: float) -> np.ndarray:
    """Return-to-go less its mean over the rollouts of the same instance at the same step.

    The mean is over rollouts still running at that step, so an early divergence does not move
    the baseline of those that go on. Advantages are then divided by their standard deviation
    over the whole batch.

    Args:
        episodes: Rollouts, `rollouts` of each instance after one another.
        rollouts: Rollouts per instance.
        discount: Per env step.

    Returns:
        Shape (E, T), zero after an episode's end.
    """
    horizon = max(len(episode.rewards) for episode in episodes)
    returns = np.full((len(episodes), horizon), np.nan)
    for row, episode in zip(returns, episodes, strict=True):
        row[: len(episode.rewards)] = returns_to_go(episode.rewards, discount)
    grouped = returns.reshape(-1, rollouts, horizon)
    running = np.isfinite(grouped)
    count = np.maximum(running.sum(axis=1, keepdims=True), 1)
    baseline = np.where(running, grouped, 0.0).sum(axis=1, keepdims=True) / count
    centred = np.where(running, grouped - baseline, 0.0).reshape(returns.shape)
    spread = centred[np.isfinite(returns)].std()
    return np.asarray(centred / (spread + 1e-8))


class Reinforce(Algorithm):
    """The update rule, and the policy that it trains."""

    def __init__(self, layout: Layout, settings: ReinforceSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        generator = torch_generator(seed, "policy")
        network: PolicyNetwork
        if settings.network == "per-feature":
            network = LSTMPolicyNetwork(
                layout, settings.hidden_size, generator, settings.memoryless
            )
        else:
            network = CoordinatewiseNetwork(layout, settings.hidden_size, generator)
        super().__init__(network, settings.policy_lr)

    def update(self, episodes: Sequence[Episode], entropy_weight: float) -> dict[str, float]:
        """Take the update's gradient steps on a batch of rollouts.

        loss = -mean over episodes of sum_t A_t * min-clipped ratio_t
               - entropy_weight * T * mean entropy per group,

        where T is the longest episode and ratio_t is the joint probability of the step's actions
        over that at the time of acting. With one pass the ratio is 1 and this is the REINFORCE
        gradient; further passes reuse the rollouts within the clipped region, as PPO does.

        Returns:
            Entropy [nats per group] and gradient norm before clipping, of the last pass.
        """
        settings = self.settings
        batch = Batch.of(episodes)
        advantage = torch.from_numpy(
            advantages(episodes, settings.rollouts_per_instance, settings.discount)
        )
        advantage = advantage.float().T
        horizon, count = advantage.shape
        before = None
        statistics = {}
        for _ in range(settings.passes):
            log_probs, _ = self._network(
                batch.observations, self.policy.network.initial_state(count)
            )
            joint = batch.joint_log_prob(log_probs)
            if before is None:
                before = joint.detach()
            credit = clipped_credit(joint - before, advantage, settings.clip_ratio) * batch.running
            mean_entropy = batch.mean_entropy(log_probs)
            loss = -credit.sum() / count - entropy_weight * horizon * mean_entropy
            self._optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
            self._optimizer.step()
            statistics = {"entropy": mean_entropy.item(), "grad_norm": norm.item()}
        return statistics

    def train(
        self, pool: RolloutPool, task: str, instances: InstanceSet, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics.

        Every draw is derived from (seed, update, episode), so that an interrupted training goes
        on as if it had not been interrupted.
        """
        settings = self.settings
        for update in range(start, settings.updates):
            drawn = draw_instances(
                self.seed, update, task, instances, settings.instances_per_update
            )
            jobs = rollout_jobs(
                self.policy, self.seed, update, drawn, settings.rollouts_per_instance
            )
            episodes: list[Episode] = list(pool.map(run_policy, jobs))
            share = update / max(1, settings.updates - 1)
            entropy_weight = (
                settings.entropy_start + (settings.entropy_end - settings.entropy_start) * share
            )
            statistics = self.update(episodes, entropy_weight)
            before = update * settings.episodes_per_update
            yield update, metrics_of(episodes, before) | statistics | costs_of(episodes)


class Learner(EpisodicLearner):
    """REINFORCE as `asg train` drives it."""

    def __init__(
        self, task: str, env: EnvSettings, settings: ReinforceSettings, seed: int, workers: int
    ) -> None:
        algorithm = Reinforce(layout_of(task, env), settings, seed)
        budget = settings.warm_start_episodes
        warm_start = WarmStart(task, env, budget, seed, workers) if budget else None
        super().__init__(task, env, algorithm, settings.updates, workers, warm_start)
