"""`ASG/ImageFolder-v0`: one's own renders and one's own photographs, in class folders."""

from pathlib import Path
from typing import Any

from asg_env.tasks.image_task import build_image_task
from asg_env.tasks.listing import (
    Listing,
    check_same_classes,
    scan_class_folders,
    scan_unlabelled,
)
from asg_env.tasks.task import Task

TASK_ID = "ASG/ImageFolder-v0"


def list_images(source: Path, target: Path, target_labels: bool) -> dict[str, Listing]:
    """Return both domains.

    Args:
        source: Folder of synthetic images, one sub-folder a class.
        target: Folder of real images, with the same sub-folders, or without any labels.
        target_labels: Whether the sub-folders of `target` are classes.

    Raises:
        DataError: A folder is missing or empty, or the classes differ.
    """
    synthetic = scan_class_folders(source)
    if not target_labels:
        return {"source": synthetic, "target": scan_unlabelled(target)}
    real = scan_class_folders(target)
    check_same_classes(synthetic, real)
    return {"source": synthetic, "target": real}


def load_task(source: str | None, target: str | None, target_labels: bool, **settings: Any) -> Task:
    """Load the images and the pretrained network.

    Args:
        source: See `list_images`; None if a store stands for both folders.
        target: See `list_images`.
        target_labels: See `list_images`.
        **settings: Those of `build_image_task`.

    Raises:
        DataError: Images, store or weights cannot be used.
    """
    listings = None
    if source is not None and target is not None:
        listings = list_images(Path(source), Path(target), target_labels)
    return build_image_task(TASK_ID, listings, **settings)
