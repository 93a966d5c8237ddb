"""From settings to what trains: the task with its splits, the device, the inner trainer."""

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from asg_env.config import EnvSettings
from asg_env.core.guidance import GuidanceError
from asg_env.core.layer_groups import split_parameters
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance, variants
from asg_env.observations import NEED_INNER_VALID
from asg_env.rewards import Reward
from asg_env.tasks import load_task
from asg_env.tasks.task import Task
from asg_env.validation import ConfigError

OUTER_VALID_SIZE = 500  # images that a reward reads, unless the settings say otherwise


def task_of(task_id: str, settings: EnvSettings) -> Task:
    """Load a task as the settings describe it.

    Raises:
        ConfigError: There is no such task, or its images, weights or packages cannot be used.
    """
    try:
        return load_task(task_id, **settings.task_arguments())
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None


def checked_task(task_id: str, settings: EnvSettings) -> Task:
    """Load a task whose network and images the settings fit; the device stays empty.

    Raises:
        ConfigError: A setting does not fit the task or the machine.
    """
    device_of(settings.device)
    task = task_of(task_id, settings)
    if "outer_valid" in task.splits and settings.outer_valid_size is not None:
        there = len(task.splits["outer_valid"])
        if settings.outer_valid_size > there:
            raise ConfigError(
                f"`outer_valid_size` must be <= {there} for {task_id}, got "
                f"{settings.outer_valid_size}; lower it"
            )
    try:
        split_parameters(task.optimizee, task.layer_groups)
    except ValueError as error:
        raise ConfigError(f"`layer_groups` must fit the network: {error}") from None
    return task


def task_to_train(task_id: str, settings: EnvSettings) -> Task:
    """Load a task with the splits that training uses; the device stays empty.

    Raises:
        ConfigError: As `checked_task`, or reward or observation read what the task does not have.
    """
    task = checked_task(task_id, settings)
    splits = dict(task.splits)
    if "outer_valid" in splits:
        size = settings.outer_valid_size or OUTER_VALID_SIZE
        splits["outer_valid"] = splits["outer_valid"].head(size)
    rewards = [
        ("reward", dict(settings.reward), s, "train_loss") for s in Reward(settings.reward).splits
    ]
    seen = settings.observation
    observed = [("observation", seen, "inner_valid", "scaled")] if seen in NEED_INNER_VALID else []
    for setting, value, split, other in (*rewards, *observed):
        needs_labels = split != "old_task"
        if split not in splits or (needs_labels and splits[split].labels is None):
            what = "labelled images" if needs_labels else "images"
            raise ConfigError(
                f"`{setting}` must not need {what} of {split}, which {task_id} does not have with "
                f"these settings, got {value}; set env.{setting} to {other}"
            )
    return replace(task, splits=splits)


def prepare_variants(
    task_id: str, settings: EnvSettings, report: Callable[[str], None] = lambda what: None
) -> None:
    """Load every network and its images that instances of the set train; the device stays empty.

    Networks that have to be pretrained first are then in the cache, for all processes.

    Args:
        task_id: Environment id.
        settings: Of the environment.
        report: Called with what is being loaded.

    Raises:
        ConfigError: As `task_to_train`.
    """
    changes = variants(settings.instances)
    for number, change in enumerate(changes):
        if len(changes) > 1:
            report(f"network and images {number + 1} of {len(changes)}")
        task_to_train(task_id, settings.of(Instance(task_id, 0, 0, **change)))


def build_trainer(task_id: str, settings: EnvSettings, processes: int = 1) -> Trainer:
    """Load a task and put the inner trainer around it, on its device.

    Args:
        task_id: Environment id.
        settings: Of the environment.
        processes: Processes that share the device, each with a trainer of its own.

    Raises:
        ConfigError: A setting does not fit the task or the machine.
    """
    task = task_to_train(task_id, settings)
    if settings.deterministic:
        # cuBLAS reads it once, at its first call in the process.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        return Trainer(
            task.optimizee,
            task.layer_groups,
            task.splits,
            settings.trainer_settings(),
            settings.guidance_terms(),
            device_of(settings.device),
            processes,
        )
    except ImportError as error:  # the package of an optimizer
        raise ConfigError(str(error)) from None
    except GuidanceError as error:
        raise ConfigError(f"`guidance` cannot be built: {error}; set env.guidance") from None


def device_of(name: str) -> torch.device:
    """Return the device called `name`.

    Raises:
        ConfigError: This machine has none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(
            f"`device` must be a torch device of this machine, got {name!r} ({reason}); use cpu"
        ) from None
    return device
