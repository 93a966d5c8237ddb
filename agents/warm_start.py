"""A start for a policy that is better than chance: a static search, and imitation of what it found.

Part of the budget goes into the static search (agents.search). A controller that takes every layer
group to its level of the vector found, and holds it there with some noise, is then imitated, so
that learning begins at the best static rates and goes on from them. The idea of learning beside a
good hand-made controller is that of residual policy learning (Silver et al., "Residual Policy
Learning", 2018); here the policy imitates it at first, and no part of it stays fixed.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from agents.episodic import Batch, PolicyNetwork, costs_of, draw_instances, metrics_of
from agents.numpy_policy import choose
from agents.recurrent_policy import Layout, RecurrentPolicy, layout_of
from agents.rollout import Episode, RolloutPool, run_policy
from agents.search import FIRST_RUNG, KEPT, search
from asg_env.actions import GRIDS, grid_levels
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.rewards import Reward
from asg_env.validation import ConfigError

IMITATED = 16  # episodes of the controller that is imitated, and what the search leaves over
LEAST = IMITATED + KEPT * FIRST_RUNG  # episodes of a warm start: a search among a few vectors
SHARPNESS = 2.0  # log-odds of the wanted choice over one that is a level away from it
PASSES, LR = 400, 0.01  # gradient steps on these episodes, and Adam's rate


def check_warm_start(episodes: int) -> None:
    """Check the setting `warm_start_episodes` of an agent.

    Raises:
        ValueError: It is too low for a search and the episodes that are imitated.
    """
    if 0 < episodes < LEAST:
        raise ValueError(
            f"`warm_start_episodes` must be 0 or >= {LEAST}, got {episodes}; "
            "raise it or leave it out"
        )


class SetPoint:
    """Takes every layer group to its level of a static vector, with noise, as a policy.

    Args:
        levels: Index on the grid that each group is to have, (G,).
        layout: Of the observations that it is given.
        env: What actions mean.
    """

    def __init__(self, levels: Sequence[int], layout: Layout, env: EnvSettings) -> None:
        self._levels, self._layout, self._env = np.asarray(levels), layout, env
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

    def probabilities(self, observations: np.ndarray) -> np.ndarray:
        """Of each choice: observations of shape (..., D) to shape (..., G, M)."""
        positions = observations[..., [own[0] for own in self._layout.per_group]]
        wanted = np.broadcast_to(self._levels, positions.shape)
        if self._env.action == "relative":  # one step down, stay, or one step up
            wanted = np.sign(wanted - grid_levels(positions, self._env.grid)) + 1
        distance = np.abs(np.arange(self._layout.actions) - wanted[..., None])
        odds = np.exp(-SHARPNESS * distance)
        return np.asarray(odds / odds.sum(axis=-1, keepdims=True))

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, None]:
        """Choose for one observation of shape (D,): an action of shape (G,), and no state."""
        generator = None if deterministic else self._generator
        return choose(self.probabilities(observation), generator), None


def imitate(network: PolicyNetwork, batch: Batch, wanted: Tensor) -> float:
    """Fit a policy network to wanted probabilities on whole episodes.

    Args:
        network: Of the policy; its critic is left alone.
        batch: Episodes.
        wanted: Probabilities of each choice at each step, shape (T, E, G, M).

    Returns:
        Kullback-Leibler divergence from the wanted choices of a layer group, nats.
    """
    parameters = [p for name, p in network.named_parameters() if not name.startswith("critic")]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    divergence = torch.zeros(())
    for _ in range(PASSES):
        log_probs, _ = network(batch.observations, network.initial_state(wanted.shape[1]))
        apart = (wanted * (wanted.log() - log_probs)).sum(dim=-1).mean(dim=-1)
        divergence = batch.mean(apart)
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
    return divergence.item()


class WarmStart:
    """The warm start of one training.

    Args:
        task: Environment id.
        env: Settings of the environment.
        episodes: That it costs, at least `LEAST`.
        seed: Training seed.
        workers: Processes that run the search; 0: this one.

    Raises:
        ConfigError: The reward reads no real labels, as the search does, or observations do not
            say where the layer groups stand.
    """

    def __init__(self, task: str, env: EnvSettings, episodes: int, seed: int, workers: int) -> None:
        if "outer_valid" not in Reward(env.reward).splits:
            raise ConfigError(
                "`agent.warm_start_episodes` must be 0 with a reward that reads no real labels, "
                f"because the search reads them, got {episodes}; leave it out"
            )
        if env.observation == "asg" and env.action == "relative":
            raise ConfigError(
                "`agent.warm_start_episodes` must be 0 with the observation asg and relative "
                f"actions, got {episodes}; set env.observation=scaled or env.action=grid"
            )
        self._task, self._env, self._seed, self._workers = task, env, seed, workers
        self.episodes = episodes

    def run(self, policy: RecurrentPolicy, pool: RolloutPool) -> dict[str, float]:
        """Search, then imitate.

        Args:
            policy: Trained in place.
            pool: Of the environments that it will be trained in.

        Returns:
            Metrics as of an update. Return, accuracy, divergence and entropy are those of the
            controller that is imitated, costs are those of the search too, and
            `imitation_divergence` is what `imitate` returns.
        """
        task, env, layout = self._task, self._env, layout_of(self._task, self._env)
        seed = derive_seed(self._seed, "warm-start")
        budget, groups = self.episodes - IMITATED, len(layout.per_group)
        blind = env.model_copy(update={"observation": "scaled"})  # the cheapest; nobody looks
        with RolloutPool(task, blind, self._workers) as unseen:
            found = search(unseen, task, env.instances, env.grid, groups, budget, seed)
        leader = SetPoint([GRIDS[env.grid].index(m) for m in found.vector], layout, env)
        left = self.episodes - found.episodes
        drawn = draw_instances(seed, 0, task, env.instances, left)
        jobs = [
            (leader, instance, derive_seed(seed, "rollout", index), False)
            for index, instance in enumerate(drawn)
        ]
        episodes: list[Episode] = list(pool.map(run_policy, jobs))
        batch = Batch.of(episodes)
        probabilities = leader.probabilities(batch.observations.numpy())
        network = cast(PolicyNetwork, policy.network)
        divergence = imitate(network, batch, torch.from_numpy(probabilities).float())
        costs = costs_of(episodes)
        entropy = -(probabilities * np.log(probabilities)).sum(axis=-1).mean(axis=-1)
        return {
            **metrics_of(episodes, found.episodes),
            "entropy": float(batch.mean(torch.from_numpy(entropy).float())),
            "imitation_divergence": divergence,
            "inner_steps": costs["inner_steps"] + found.inner_steps,
            "validation_images": costs["validation_images"] + found.validation_images,
        }
