"""Tasks by environment id; each module has a `load_task()`."""

from importlib import import_module

from asg_env.tasks.task import Task

TASK_MODULES = {"ASG/Digits-v0": "asg_env.tasks.digits"}


def load_task(task_id: str) -> Task:
    """Load a task's images and pretrained network.

    Raises:
        ValueError: No task has this id.
    """
    if task_id not in TASK_MODULES:
        raise ValueError(f"`task` must be one of {', '.join(TASK_MODULES)}, got '{task_id}'")
    task: Task = import_module(TASK_MODULES[task_id]).load_task()
    return task
