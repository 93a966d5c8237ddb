"""`asg tasks` and `asg info`."""

import json
from typing import Annotated, Any

import torch
import typer

from agents.cli.options import Assignments, console
from agents.experiment import env_settings
from agents.run_folder import provenance
from asg_env.build import checked_task, device_of
from asg_env.config import EnvSettings
from asg_env.core.data import HostImages, placement
from asg_env.instances import VARIED, published_test_instances
from asg_env.tasks import SUMMARIES
from asg_env.validation import ConfigError


def tasks_command() -> None:
    """List the tasks."""
    for task_id, summary in SUMMARIES.items():
        console.print(f"{task_id}  {summary}")


def info_command(
    task: Annotated[str | None, typer.Option(help="Task id; versions alone if left out.")] = None,
    instances: Annotated[
        str | None, typer.Option(help="Print the published test instances of this set.")
    ] = None,
    settings: Assignments = None,
) -> None:
    """Print versions, and a task's groups, splits, digest and storage, as one JSON object.

    A task on one's own images is told where they are by --set env.root=DIR and the like.
    """
    if task is None and (instances is not None or settings):
        raise ConfigError("--instances and --set belong to a task; add --task ID")
    if instances is not None and instances not in VARIED:
        raise ConfigError(
            f"--instances must be one of {', '.join(VARIED)}, got '{instances}'; give one of these"
        )
    report: dict[str, Any] = {"provenance": provenance()}
    if task is not None:
        own = [] if instances is None else [f"env.instances={instances}"]
        report["task"] = _describe(task, env_settings(task, [*(settings or ()), *own]))
    if task is not None and instances is not None:
        listed = published_test_instances(task, instances)
        report["test_instances"] = [instance.to_dict() for instance in listed]
    console.print_json(json.dumps(report))


def _describe(task_id: str, settings: EnvSettings) -> dict[str, Any]:
    task = checked_task(task_id, settings)
    device = device_of(settings.device)
    placed = placement(task.splits, device, processes=1)
    return {
        "id": task.id,
        "summary": task.summary,
        "layer_groups": dict(task.layer_groups),
        "splits": {name: len(split) for name, split in task.splits.items()},
        "unlabelled": [name for name, split in task.splits.items() if split.labels is None],
        "storage": _storage(task.splits["train"].images, placed, device),
        "teacher": "outputs remembered"
        if settings.augmentation == "none"
        else f"computed at every step, as images are augmented ({settings.augmentation})",
        "parameters": sum(p.numel() for p in task.optimizee.parameters() if p.requires_grad),
        "data_digest": task.digest,
        "reference_digest": task.reference_digest,
        "same_data_as_reference": None
        if task.reference_digest is None
        else task.digest == task.reference_digest,
    }


def _storage(images: torch.Tensor | HostImages, placed: str, device: torch.device) -> str:
    """Say in words where training reads its images."""
    if isinstance(images, torch.Tensor) or placed == "resident":
        return f"resident on {device}"
    source = "the memory-mapped store" if images.cheap else "image files, decoded every time"
    hop = ", through pinned memory" if device.type == "cuda" else ""
    return f"{source}, batch by batch, one batch ahead{hop}"
