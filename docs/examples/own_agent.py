"""An agent of one's own, to copy: the cross-entropy method on the weights of a linear policy.

Every candidate is a matrix of weights drawn from a Gaussian. All candidates of an update train on
the same instances; the Gaussian then moves to the best of them. docs/algorithms.md says what each
part of this file is for.

    asg train docs/examples/own_agent.yaml --out runs/own
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from agents.episodic import costs_of, draw_instances, metrics_of
from agents.rollout import RolloutPool, run_policy
from agents.run_folder import write_text
from asg_env.build import task_of
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.observations import Observation
from asg_env.validation import ConfigError, Settings

CHECKPOINT = "last.json"


class CrossEntropySettings(Settings):
    """`agent:` of an experiment file."""

    kind: str
    updates: Annotated[int, Field(ge=1)] = 15
    population: Annotated[int, Field(ge=2)] = 16  # candidates of an update
    elites: Annotated[int, Field(ge=1)] = 4  # the best of them, which the Gaussian moves to
    instances_per_update: Annotated[int, Field(ge=1)] = 2  # an episode of each per candidate
    start_deviation: Annotated[float, Field(gt=0)] = 0.5
    least_deviation: Annotated[float, Field(gt=0)] = 0.1  # or the search would soon stand still

    @model_validator(mode="after")
    def _check_combinations(self) -> "CrossEntropySettings":
        if self.elites > self.population:
            raise ValueError(
                f"`elites` must be <= population, {self.population}, got {self.elites}; lower it"
            )
        return self

    @property
    def episodes(self) -> int:
        """Training episodes in all."""
        return self.updates * self.population * self.instances_per_update


class LinearPolicy:
    """Per layer group tanh(w x + b), with the mean of a Gaussian over weights or one draw of it."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self.mean, self.deviation = mean, deviation  # each of shape (G, D + 1)
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Draw the weights of an episode."""
        normal = numpy_generator(seed, "weights").standard_normal(self.mean.shape)
        self.drawn = self.mean + self.deviation * normal

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Return an action for one observation of shape (D,), and the state: there is none."""
        weights = self.mean if deterministic else self.drawn
        return np.tanh(weights @ np.append(observation, 1.0)).astype(np.float32), None


class Learner:
    """What `asg train` drives."""

    def __init__(
        self, task: str, env: EnvSettings, settings: CrossEntropySettings, seed: int, workers: int
    ) -> None:
        if env.action != "box":
            raise ConfigError(f"`env.action` must be box, got {env.action}; set env.action=box")
        self.task, self.env, self.settings = task, env, settings
        self.seed, self.workers = seed, workers
        self.updates = settings.updates
        groups = tuple(task_of(task, env).layer_groups)
        labels = Observation(env.observation, groups, env.grid, env.further_terms()).labels
        start = np.full((len(groups), len(labels) + 1), settings.start_deviation)
        self.policy = LinearPolicy(np.zeros_like(start), start)

    def train(self, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from update `start` on; yield each finished update and its metrics."""
        with RolloutPool(self.task, self.env, self.workers) as pool:
            for update in range(start, self.updates):
                yield update, self._update(pool, update)

    def _update(self, pool: RolloutPool, update: int) -> dict[str, float]:
        # Every draw follows from seed, update and number: a resumed training gives the same bits.
        settings, policy = self.settings, self.policy
        count = settings.instances_per_update
        drawn = draw_instances(self.seed, update, self.task, self.env.instances, count)
        seeds = [derive_seed(self.seed, "candidate", update, i) for i in range(settings.population)]
        jobs = [(policy, instance, seed, False) for seed in seeds for instance in drawn]
        episodes = list(pool.map(run_policy, jobs))
        returns = np.array([e.rewards.sum() for e in episodes]).reshape(-1, count).mean(axis=1)
        elites = []
        for index in np.argsort(-returns, kind="stable")[: settings.elites]:
            policy.seed(seeds[index])
            elites.append(policy.drawn)
        deviation = np.maximum(np.std(elites, axis=0), settings.least_deviation)
        self.policy = LinearPolicy(np.mean(elites, axis=0), deviation)
        own = {"entropy": 0.0, "deviation": float(deviation.mean())}  # no action is drawn by itself
        return metrics_of(episodes, update * len(jobs)) | own | costs_of(episodes)

    def save(self, path: Path, update: int) -> None:
        """Write all that the next update depends on."""
        policy = self.policy
        values = {"mean": policy.mean.tolist(), "deviation": policy.deviation.tolist()}
        write_text(path, json.dumps({"updates": update + 1, **values}) + "\n")

    def load(self, path: Path) -> int:
        """Read what `save` wrote; return the number of finished updates."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            policy = LinearPolicy(np.array(values["mean"]), np.array(values["deviation"]))
            updates = int(values["updates"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is no whole checkpoint ({error}); train anew") from None
        if policy.mean.shape != self.policy.mean.shape:
            raise ConfigError(
                f"{path} has weights of shape {policy.mean.shape}, here they must be of shape "
                f"{self.policy.mean.shape}; use it on tasks with the same layer groups"
            )
        self.policy = policy
        return updates


def load_policy(path: Path, experiment: Any) -> LinearPolicy:
    """Return the policy of a checkpoint, for the task and settings of an experiment."""
    learner = Learner(experiment.task, experiment.env, experiment.agent, experiment.seed, 0)
    learner.load(path)
    return learner.policy
