"""Training a controller: from an experiment file to a run folder."""

import json
import os
import time
from collections.abc import Callable

import torch
from torch.utils.tensorboard import SummaryWriter

from agents.baselines import Static
from agents.experiment import Experiment
from agents.policy import Policy
from agents.rollout import RolloutPool, run_controller
from agents.run_folder import RunFolder, write_text
from asg_env.config import EnvSettings
from asg_env.instances import Instance
from asg_env.validation import ConfigError

# What every update of an agent reports, beside what is its own.
METRICS = ("episodes", "return", "accuracy", "entropy", "inner_steps", "validation_images")
Progress = Callable[[int, int, dict[str, float]], None]  # (seed index, update, metrics)


def train(run: RunFolder, progress: Progress) -> None:
    """Train every seed of the experiment; finished updates are skipped, so it also resumes.

    After each update the metrics line is flushed, then the checkpoint is renamed into place. A
    run killed in between repeats that update and writes the same line again, but for its
    `seconds`, which count from the start of the process.

    Args:
        run: Where to write.
        progress: Called after each update.

    Raises:
        ConfigError: A checkpoint is damaged.
    """
    torch.set_num_threads(1)  # bits change with the thread count
    experiment = run.experiment
    for index in range(experiment.train.seeds):
        train_seed(run, index, progress, experiment.train.workers)


def train_seed(run: RunFolder, index: int, progress: Progress, workers: int) -> None:
    """Train one of the run's seeds; see `train`.

    Args:
        run: Where to write.
        index: Which seed.
        progress: Called after each update.
        workers: Processes that run the episodes; 0: this one.
    """
    experiment = run.experiment
    folder = run.seed_folder(index)
    checkpoint = folder / "checkpoints" / experiment.agent_module.CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    learner = experiment.agent_module.Learner(
        experiment.task,
        experiment.env,
        experiment.agent,
        experiment.seed + index,
        workers,
    )
    if hasattr(learner, "folder"):  # SB3's, for its evaluations and the models that it keeps
        learner.folder = folder
    start = learner.load(checkpoint) if checkpoint.exists() else 0
    if start >= learner.updates:
        return
    metrics = folder / "metrics.jsonl"
    # Lines beyond the checkpoint are of updates that are repeated; the last may be torn.
    lines_before = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    write_text(metrics, "".join(lines_before.splitlines(keepends=True)[:start]))
    began = time.perf_counter()
    with (
        metrics.open("a", encoding="utf-8") as lines,
        SummaryWriter(str(folder / "tensorboard"), purge_step=start) as board,
    ):
        for update, values in learner.train(start):
            seconds = time.perf_counter() - began
            missing = [name for name in METRICS if name not in values]
            if missing:  # of an agent of one's own
                raise ConfigError(
                    f"the metrics of agent {experiment.agent.kind} must hold {', '.join(METRICS)}, "
                    f"got none called {missing[0]}; let its `train` yield it"
                )
            lines.write(
                json.dumps({"update": update, **values, "seconds": round(seconds, 3)}) + "\n"
            )
            lines.flush()
            os.fsync(lines.fileno())
            for name, value in values.items():
                board.add_scalar(name, value, update)
            learner.save(checkpoint, update)
            progress(index, update, values)


def load_policies(run: RunFolder) -> list[Policy]:
    """Policies of a run's last checkpoints, one per training seed.

    Raises:
        ConfigError: A seed has no checkpoint, or it is damaged.
    """
    return [load_policy(run, index) for index in range(run.experiment.train.seeds)]


def load_policy(run: RunFolder, index: int) -> Policy:
    """Policy of the last checkpoint of one training seed.

    Raises:
        ConfigError: There is no checkpoint, or it is damaged.
    """
    experiment = run.experiment
    path = run.seed_folder(index) / "checkpoints" / experiment.agent_module.CHECKPOINT
    if not path.exists():
        raise ConfigError(
            f"{run.path} has no checkpoint of training seed {index}; "
            "finish it with asg train --resume"
        )
    policy: Policy = experiment.agent_module.load_policy(path, experiment)
    return policy


def estimate_minutes(experiment: Experiment, baseline_episodes: int) -> dict[str, float]:
    """Time a few real episodes in the workers and scale up.

    Args:
        experiment: What is going to be run.
        baseline_episodes: Training runs that tuning, search and the final comparison take.

    Returns:
        Minutes for `training` and `comparison`, and `seconds_per_episode` of one worker.
    """
    workers = experiment.train.workers
    # PPO trains on processes of its own, as many as the cores can feed.
    own = getattr(experiment.agent, "environments", workers)
    trainers = min(own, os.cpu_count() or 1) if own != workers else workers
    groups = len(experiment.layer_groups)
    seconds = seconds_per_episode(experiment.task, experiment.env, groups, workers)
    training = experiment.agent.episodes * experiment.train.seeds
    return {
        "training": training * seconds / trainers / 60,
        "comparison": baseline_episodes * seconds / workers / 60,
        "seconds_per_episode": seconds,
    }


def seconds_per_episode(task: str, settings: EnvSettings, groups: int, workers: int) -> float:
    """Seconds that an episode takes a worker when all are at work, by a few real ones."""
    job = (Static((0.01,) * groups), Instance(task, head_seed=0, data_seed=0))
    with RolloutPool(task, settings, workers) as pool:
        list(pool.map(run_controller, [job] * workers))  # warm-up
        began = time.perf_counter()
        list(pool.map(run_controller, [job] * (2 * workers)))
        return (time.perf_counter() - began) / 2
