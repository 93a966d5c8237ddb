"""What agents that learn from whole episodes share: rollouts, batches, metrics, checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import RecurrentPolicy
from agents.rollout import Episode, RolloutPool
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.files import replacing
from asg_env.instances import Instance, InstanceSet, draw_instance
from asg_env.validation import ConfigError

if TYPE_CHECKING:  # it reads batches of episodes itself
    from agents.warm_start import WarmStart


@dataclass(frozen=True)
class Batch:
    """Episodes side by side, padded with zeros to the longest of T env steps.

    Attributes:
        observations: Shape (T, E, D).
        actions: int64, shape (T, E, G).
        running: 1 where the episode has a step, shape (T, E).
    """

    observations: Tensor
    actions: Tensor
    running: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Self:
        """Put episodes side by side."""
        horizon, count = max(len(e.rewards) for e in episodes), len(episodes)
        running = torch.zeros(horizon, count)
        observations = torch.zeros(horizon, count, episodes[0].observations.shape[1])
        actions = torch.zeros(horizon, count, episodes[0].actions.shape[1], dtype=torch.int64)
        for column, episode in enumerate(episodes):
            steps = len(episode.rewards)
            running[:steps, column] = 1
            observations[:steps, column] = torch.from_numpy(episode.observations)
            actions[:steps, column] = torch.from_numpy(episode.actions)
        return cls(observations, actions, running)

    def columns(self, index: Tensor) -> "Batch":
        """Return some of the episodes."""
        return Batch(self.observations[:, index], self.actions[:, index], self.running[:, index])

    def joint_log_prob(self, log_probs: Tensor) -> Tensor:
        """Log-probability of each step's actions, summed over layer groups, shape (T, E)."""
        return log_probs.gather(-1, self.actions[..., None])[..., 0].sum(dim=-1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values of shape (T, E) over the steps that there are."""
        return (values * self.running).sum() / self.running.sum()

    def mean_entropy(self, log_probs: Tensor) -> Tensor:
        """Mean entropy of a layer group's choice, nats."""
        return self.mean(-(log_probs.exp() * log_probs).sum(dim=-1).mean(dim=-1))


def clipped_credit(log_ratio: Tensor, advantage: Tensor, clip_ratio: float) -> Tensor:
    """min(r A, clip(r, 1 - c, 1 + c) A), elementwise, for r = exp(log_ratio).

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return torch.minimum(ratio * advantage, clipped * advantage)


def draw_instances(
    seed: int, update: int, task: str, instances: InstanceSet, count: int
) -> list[Instance]:
    """Draw the train instances of one update."""
    generator = numpy_generator(seed, "train-instances", update)
    return [draw_instance(task, instances, generator) for _ in range(count)]


def rollout_jobs(
    policy: RecurrentPolicy, seed: int, update: int, drawn: Sequence[Instance], rollouts: int
) -> list[tuple[RecurrentPolicy, Instance, int, bool]]:
    """Jobs of `run_policy`: sampled rollouts of each instance after one another."""
    return [
        (policy, instance, derive_seed(seed, "rollout", update, i, j), False)
        for i, instance in enumerate(drawn)
        for j in range(rollouts)
    ]


def metrics_of(episodes: Sequence[Episode], before: int) -> dict[str, float]:
    """What every update reports of its episodes.

    Args:
        episodes: Of this update.
        before: How many earlier updates had.
    """
    return {
        "episodes": before + len(episodes),
        "return": float(np.mean([e.rewards.sum() for e in episodes])),
        "accuracy": float(np.mean([final_accuracy(e) for e in episodes])),
        "diverged": float(np.mean([e.diverged for e in episodes])),
    }


def costs_of(episodes: Sequence[Episode]) -> dict[str, float]:
    """Inner steps taken and validation images evaluated."""
    return {
        "inner_steps": sum(e.inner_steps for e in episodes),
        "validation_images": sum(e.validation_images for e in episodes),
    }


def final_accuracy(episode: Episode) -> float:
    """outer_valid accuracy at the end, 0 where the reward reads no real label."""
    return float(episode.accuracy[-1]) if len(episode.accuracy) else 0.0


def pack(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return network and optimizer as named tensors."""
    tensors = {f"network/{k}": v for k, v in network.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v for k, v in entry.items()}
    return tensors


def unpack(
    tensors: dict[str, Tensor], network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Take over the tensors of `pack`.

    Raises:
        RuntimeError: They are of another network.
        ValueError: They are of an optimizer of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    parameters = sum(len(group["params"]) for group in groups)
    if state and len(state) != parameters:  # torch would take them: another agent's, same network
        raise ValueError(
            f"it holds the optimizer of {len(state)} parameters, here it has {parameters}"
        )
    network.load_state_dict(
        {k.removeprefix("network/"): v for k, v in tensors.items() if k.startswith("network/")}
    )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


PolicyNetwork = LSTMPolicyNetwork | CoordinatewiseNetwork


class Algorithm(ABC):
    """An update rule, and the policy that it trains with Adam.

    Args:
        network: Of the policy.
        policy_lr: Of Adam.
        eps: Of Adam.
        trains_values: Whether the network's critic is trained too.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        policy_lr: float,
        eps: float = 1e-8,
        trains_values: bool = False,
    ) -> None:
        self._network = network
        self.policy = RecurrentPolicy(network)
        self._parameters = [
            parameter
            for name, parameter in network.named_parameters()
            if trains_values or not name.startswith("critic")
        ]
        self._optimizer = torch.optim.Adam(self._parameters, lr=policy_lr, eps=eps, fused=True)

    @abstractmethod
    def train(
        self, pool: RolloutPool, task: str, instances: InstanceSet, start: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics.

        Every draw is derived from (seed, update, episode), so that an interrupted training goes
        on as if it had not been interrupted.
        """

    def state(self) -> dict[str, Tensor]:
        """Return network and optimizer as named tensors."""
        return pack(self._network, self._optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of `state`."""
        unpack(tensors, self._network, self._optimizer)


class EpisodicLearner:
    """What `asg train` drives: rollout workers, an algorithm, and its checkpoint.

    Args:
        task: Environment id.
        env: Settings of the environment.
        algorithm: What is trained.
        updates: Of the algorithm.
        workers: Processes that run the episodes; 0: this one.
        warm_start: Stands in the place of a first update; those of the algorithm follow.
    """

    def __init__(
        self,
        task: str,
        env: EnvSettings,
        algorithm: Algorithm,
        updates: int,
        workers: int,
        warm_start: "WarmStart | None" = None,
    ) -> None:
        self._task, self._env, self._workers = task, env, workers
        self._algorithm, self._warm_start = algorithm, warm_start
        self.updates = updates + (warm_start is not None)

    @property
    def policy(self) -> RecurrentPolicy:
        """The policy as trained so far."""
        return self._algorithm.policy

    def train(self, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (update, metrics) from update `start` on."""
        instances, warm = self._env.instances, self._warm_start
        with RolloutPool(self._task, self._env, self._workers) as pool:
            if warm is None:
                yield from self._algorithm.train(pool, self._task, instances, start)
                return
            if start == 0:
                yield 0, warm.run(self.policy, pool)
            done = max(start - 1, 0)
            for update, metrics in self._algorithm.train(pool, self._task, instances, done):
                yield update + 1, {**metrics, "episodes": metrics["episodes"] + warm.episodes}

    def save(self, path: Path, update: int) -> None:
        """Write network, optimizer and the number of finished updates as safetensors."""
        with replacing(path) as temporary:
            save_file(self._algorithm.state(), temporary, {"updates": str(update + 1)})

    def load(self, path: Path) -> int:
        """Read a checkpoint; return the number of finished updates.

        Raises:
            ConfigError: The file is damaged or belongs to another agent.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                updates = int(file.metadata()["updates"])
                self._algorithm.load_state({key: file.get_tensor(key) for key in file.keys()})
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{path} is no whole checkpoint of this agent ({reason}); "
                "restore it from a copy or train anew"
            ) from None
        return updates


def load_policy(path: Path, experiment: Any) -> RecurrentPolicy:
    """Policy of a checkpoint; see `EpisodicLearner.load` for errors."""
    learner: EpisodicLearner = experiment.agent_module.Learner(
        experiment.task, experiment.env, experiment.agent, experiment.seed, workers=0
    )
    learner.load(path)
    return learner.policy


CHECKPOINT = "last.safetensors"
