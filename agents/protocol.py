"""What `asg evaluate` and `asg benchmark` share: judging an episode, choosing how an agent acts.

Greedy or sampled actions are chosen on outer_valid of *train* instances, before any test image is
looked at.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.baselines import Controller
from agents.experiment import Experiment
from agents.judgement import test_network
from agents.policy import Policy
from agents.rollout import Episode, WorkerPool, run_controller, run_policy
from agents.run_folder import RunFolder, is_imported
from agents.search import tuning_instances
from asg_env.config import EnvSettings
from asg_env.core.evaluation import Metric
from asg_env.core.seeding import derive_seed
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance, InstanceSet
from asg_env.rewards import Reward
from asg_env.validation import ConfigError

EVALUATION_SEED = 0  # of sampled actions, searches and resamples
CONTROLLER_ROWS = {False: "controller (sampled)", True: "controller (greedy)"}
MODE = "mode.json"  # what a benchmark chose, in the folder of a training seed
# What controllers must have been trained with alike, beside images, network and inner steps, for
# their networks to be compared.
SAME_PROBLEM = ("batch_size", "metric", "flip_average")
MODE_INSTANCES = 8  # train instances on which greedy or sampled actions are chosen


@dataclass(frozen=True)
class TestResult:
    """An episode and what the trained network does on images nobody has looked at.

    Attributes:
        episode: Its record.
        correct: Per test image, bool, shape (N,); all False after divergence.
        recall: Mean over classes of the share of the class's test images that is right.
        retention: See `agents.judgement.retention_of`.
    """

    episode: Episode
    correct: np.ndarray
    recall: float
    retention: float | None

    def score(self, metric: Metric) -> float:
        """Return the figure called `metric`."""
        return float(self.correct.mean()) if metric == "accuracy" else self.recall


def judge_policy(
    env: LayerwiseLREnv, policy: Policy, instance: Instance, seed: int, deterministic: bool
) -> TestResult:
    """Run a policy on an instance and test the network."""
    episode = run_policy(env, policy, instance, seed, deterministic)
    return TestResult(episode, *test_network(env.trainer, episode.diverged))


def judge_controller(env: LayerwiseLREnv, controller: Controller, instance: Instance) -> TestResult:
    """Run a hand-made controller on an instance and test the network."""
    episode = run_controller(env, controller, instance)
    return TestResult(episode, *test_network(env.trainer, episode.diverged))


def tuning_set(task: str, instances: InstanceSet, count: int) -> list[Instance]:
    """Return the train instances on which everything that is tuned is chosen."""
    return tuning_instances(task, instances, derive_seed(EVALUATION_SEED, "tuning"), count)


def choose_mode(
    pool: WorkerPool, policies: Sequence[Policy], listed: Sequence[Instance]
) -> tuple[bool, dict[str, int]]:
    """Whether policies do better with greedy than with sampled actions, by outer_valid.

    Args:
        pool: Of environments.
        policies: One per training seed.
        listed: Train instances.

    Returns:
        True for greedy; episodes, inner steps and validation images that choosing cost, per
        training seed.
    """
    jobs = [
        (policy, instance, derive_seed(EVALUATION_SEED, "mode", seed, index), greedy)
        for greedy in (False, True)
        for seed, policy in enumerate(policies)
        for index, instance in enumerate(listed)
    ]
    episodes: list[Episode] = list(pool.map(run_policy, jobs))
    accuracies = np.array([episode.accuracy[-1] for episode in episodes])
    sampled, greedy = accuracies.reshape(2, -1).mean(axis=1)
    cost = {
        "episodes": len(episodes) // len(policies),
        "inner_steps": sum(e.inner_steps for e in episodes) // len(policies),
        "validation_images": sum(e.validation_images for e in episodes) // len(policies),
    }
    return bool(greedy >= sampled), cost


def reward_in_words(experiment: Experiment) -> str:
    """Weights and terms of an experiment's reward."""
    return ", ".join(f"{weight:g} x {name}" for name, weight in experiment.env.reward.items())


def reads_real_labels(experiment: Experiment) -> bool:
    """Whether the reward reads labels of real images."""
    return "outer_valid" in Reward(experiment.env.reward).splits


def acts_greedily(run: RunFolder, training_seed: int = 0) -> bool:
    """Whether a run's controller takes its likeliest actions: what its comparison chose.

    Of a run that is part of a benchmark, what the benchmark chose for this training seed. True
    before either, as for a run whose reward reads no real label; but False for an imported policy
    of the original, which drew its actions.

    Raises:
        ConfigError: The file that says it is damaged.
    """
    compared, chosen = run.path / "results.json", run.seed_folder(training_seed) / MODE
    path = compared if compared.exists() else chosen
    if not path.exists():
        return not is_imported(run)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path == chosen:
            primary = CONTROLLER_ROWS[values["greedy"]]
        else:
            primary = values["protocol"]["primary"]
        return {row: greedy for greedy, row in CONTROLLER_ROWS.items()}[primary]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path} is no whole comparison; repeat it with asg evaluate {run.path}"
        ) from None


def check_same_problem(name: str, theirs: EnvSettings, ours: EnvSettings) -> None:
    """Find out whether networks of two trainings are trained and tested on the same, for as long.

    Raises:
        ConfigError: They were not, so that a difference would say nothing of the controllers.
    """
    if theirs.task_arguments() != ours.task_arguments():
        raise ConfigError(
            f"{name} is on other images or another network than what it stands beside; set the same"
        )
    for what, their, our in [
        ("inner steps", sum(theirs.windows()), sum(ours.windows())),
        *((f"env.{key}", getattr(theirs, key), getattr(ours, key)) for key in SAME_PROBLEM),
    ]:
        if their != our:
            raise ConfigError(
                f"{name} trains with {what} {their}, what it stands beside with {our}; set the same"
            )
