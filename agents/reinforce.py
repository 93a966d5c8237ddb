"""REINFORCE with per-feature LSTMs and one action head per layer group.

The network is the one of ASG (`agents.lstm_policy`). What the original lacked is here: every step
has its own credit, the baseline is the mean over rollouts of the same instance, the recurrent
state is carried through the episode unless `memoryless` says otherwise, and entropy bonus and
gradients are bounded.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.lstm_policy import Layout, LSTMPolicyNetwork, ReinforcePolicy, layout_of
from agents.rollout import Episode, RolloutPool, run_policy
from asg_env.config import ConfigError, EnvSettings, Settings
from asg_env.core.seeding import derive_seed, numpy_generator, torch_generator
from asg_env.instances import InstanceSet, draw_instance


class ReinforceSettings(Settings):
    """`agent:` of an experiment file, for `kind: reinforce`."""

    kind: Literal["reinforce"] = "reinforce"
    updates: Annotated[int, Field(ge=1)] = 30
    instances_per_update: Annotated[int, Field(ge=1)] = 4
    rollouts_per_instance: Annotated[int, Field(ge=2)] = 8
    hidden_size: Annotated[int, Field(ge=1)] = 20
    memoryless: bool = False  # every step from a zero state, as the original acted
    policy_lr: Annotated[float, Field(gt=0)] = 0.01
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    entropy_start: Annotated[float, Field(ge=0)] = 0.01  # bonus per nat, first update
    entropy_end: Annotated[float, Field(ge=0)] = 0.0  # bonus per nat, last update
    passes: Annotated[int, Field(ge=1)] = 4  # gradient steps on each batch of rollouts
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2  # of the probability ratio, from 2 passes on
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @property
    def episodes(self) -> int:
        """Training episodes in all."""
        return self.updates * self.instances_per_update * self.rollouts_per_instance


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


class Reinforce:
    """The learner: a network, its optimizer and the update rule."""

    def __init__(self, layout: Layout, settings: ReinforceSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.policy = ReinforcePolicy(
            LSTMPolicyNetwork(
                layout,
                settings.hidden_size,
                torch_generator(seed, "policy"),
                settings.memoryless,
            )
        )
        self._parameters = [
            p for name, p in self.policy.network.named_parameters() if not name.startswith("critic")
        ]
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.policy_lr)

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
        advantage = (
            torch.from_numpy(
                advantages(episodes, settings.rollouts_per_instance, settings.discount)
            )
            .float()
            .T
        )
        horizon, count = advantage.shape
        running = torch.zeros(horizon, count)
        observations = torch.zeros(horizon, count, episodes[0].observations.shape[1])
        actions = torch.zeros(horizon, count, episodes[0].actions.shape[1], dtype=torch.int64)
        for column, episode in enumerate(episodes):
            steps = len(episode.rewards)
            running[:steps, column] = 1
            observations[:steps, column] = torch.from_numpy(episode.observations)
            actions[:steps, column] = torch.from_numpy(episode.actions)
        before = None
        statistics = {}
        for _ in range(settings.passes):
            log_probs, _ = self.policy.network(
                observations, self.policy.network.initial_state(count)
            )
            joint = log_probs.gather(-1, actions[..., None])[..., 0].sum(dim=-1)  # (T, E)
            if before is None:
                before = joint.detach()
            ratio = (joint - before).exp()
            clipped = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
            credit = torch.minimum(ratio * advantage, clipped * advantage) * running
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=-1)  # (T, E)
            mean_entropy = (entropy * running).sum() / running.sum()
            loss = -credit.sum() / count - entropy_weight * horizon * mean_entropy
            self._optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters, settings.max_grad_norm)
            self._optimizer.step()
            statistics = {"entropy": mean_entropy.item(), "grad_norm": norm.item()}
        return statistics

    def state(self) -> dict[str, Tensor]:
        """Return network and optimizer as named tensors."""
        tensors = {f"network/{k}": v for k, v in self.policy.network.state_dict().items()}
        for index, entry in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v for k, v in entry.items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of `state`."""
        self.policy.network.load_state_dict(
            {k.removeprefix("network/"): v for k, v in tensors.items() if k.startswith("network/")}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def train(
        self, pool: RolloutPool, task: str, instances: InstanceSet, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics.

        Every draw is derived from (seed, update, episode), so that an interrupted training goes
        on as if it had not been interrupted.
        """
        settings = self.settings
        for update in range(start, settings.updates):
            draw = numpy_generator(self.seed, "train-instances", update)
            drawn = [
                draw_instance(task, instances, draw) for _ in range(settings.instances_per_update)
            ]
            jobs = [
                (self.policy, instance, derive_seed(self.seed, "rollout", update, i, j), False)
                for i, instance in enumerate(drawn)
                for j in range(settings.rollouts_per_instance)
            ]
            episodes: list[Episode] = list(pool.map(run_policy, jobs))
            share = update / max(1, settings.updates - 1)
            entropy_weight = (
                settings.entropy_start + (settings.entropy_end - settings.entropy_start) * share
            )
            statistics = self.update(episodes, entropy_weight)
            yield (
                update,
                {
                    "episodes": (update + 1) * len(jobs),
                    "return": float(np.mean([e.rewards.sum() for e in episodes])),
                    "accuracy": float(np.mean([final_accuracy(e) for e in episodes])),
                    "diverged": float(np.mean([e.diverged for e in episodes])),
                    **statistics,
                    "inner_steps": sum(e.inner_steps for e in episodes),
                    "validation_images": sum(e.validation_images for e in episodes),
                },
            )


def final_accuracy(episode: Episode) -> float:
    """outer_valid accuracy at the end, 0 where the reward reads no real label."""
    return float(episode.accuracy[-1]) if len(episode.accuracy) else 0.0


class Learner:
    """What `asg train` drives: rollout workers, the learner, and its checkpoint."""

    def __init__(
        self, task: str, env: EnvSettings, settings: ReinforceSettings, seed: int, workers: int
    ) -> None:
        self._task, self._env, self._workers = task, env, workers
        self._layout = layout_of(task, env)
        self._agent = Reinforce(self._layout, settings, seed)
        self.updates = settings.updates

    @property
    def policy(self) -> ReinforcePolicy:
        """The policy as trained so far."""
        return self._agent.policy

    def train(self, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (update, metrics) from update `start` on."""
        with RolloutPool(self._task, self._env, self._workers) as pool:
            yield from self._agent.train(pool, self._task, self._env.instances, start)

    def save(self, path: Path, update: int) -> None:
        """Write network, optimizer and the number of finished updates as safetensors."""
        temporary = path.with_name(path.name + ".tmp")
        save_file(self._agent.state(), str(temporary), metadata={"updates": str(update + 1)})
        os.replace(temporary, path)

    def load(self, path: Path) -> int:
        """Read a checkpoint; return the number of finished updates.

        Raises:
            ConfigError: The file is damaged or belongs to another agent.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                updates = int(file.metadata()["updates"])
                self._agent.load_state({key: file.get_tensor(key) for key in file.keys()})
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{path} is no whole checkpoint of this agent ({reason}); "
                "restore it from a copy or train anew"
            ) from None
        return updates


def load_policy(path: Path, experiment: Any) -> ReinforcePolicy:
    """Policy of a checkpoint; see `Learner.load` for errors."""
    learner = Learner(
        experiment.task, experiment.env, experiment.agent, experiment.seed, experiment.train.workers
    )
    learner.load(path)
    return learner.policy


AgentSettings = ReinforceSettings
CHECKPOINT = "last.safetensors"
