"""Tasks by environment id; each module has a `load_task`."""

from importlib import import_module
from typing import Any

from asg_env.tasks.task import Task

TASK_MODULES = {
    "ASG/Digits-v0": "asg_env.tasks.digits",
    "ASG/DigitsImageNet-v0": "asg_env.tasks.digits_imagenet",
    "ASG/VisDA17-v0": "asg_env.tasks.visda17",
    "ASG/ImageFolder-v0": "asg_env.tasks.image_folder",
}
SUMMARIES = {
    "ASG/Digits-v0": "rendered digits 5-9 -> handwritten 5-9; teacher: real handwritten 0-4",
    "ASG/DigitsImageNet-v0": "rendered digits 0-9 -> handwritten 0-9; teacher: EfficientNet-Lite0 "
    "on ImageNet",
    "ASG/VisDA17-v0": "VisDA-17 renders -> photographs, 12 classes; your copy of the images",
    "ASG/ImageFolder-v0": "any two folders with the same class folders",
}


def load_task(task_id: str, **arguments: Any) -> Task:
    """Load a task's images and pretrained network.

    Args:
        task_id: Environment id.
        **arguments: The task's own settings, those of its `load_task`.

    Raises:
        ValueError: No task has this id, or its images or weights cannot be used.
        ImportError: A package that the task needs is not installed.
    """
    if task_id not in TASK_MODULES:
        raise ValueError(f"`task` must be one of {', '.join(TASK_MODULES)}, got '{task_id}'")
    task: Task = import_module(TASK_MODULES[task_id]).load_task(**arguments)
    return task
