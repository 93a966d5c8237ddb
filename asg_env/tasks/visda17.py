"""`ASG/VisDA17-v0`: renders to photographs, 12 classes, the task of the paper's central table.

The images are the user's own copy, in the layout of the challenge: `train/` and `validation/`,
each with its `image_list.txt` (docs/original.md, section 4).
"""

from pathlib import Path
from typing import Any

from asg_env.tasks.image_task import build_image_task
from asg_env.tasks.listing import VISDA_CLASSES, Listing, read_visda_list
from asg_env.tasks.task import Task

TASK_ID = "ASG/VisDA17-v0"


def list_images(root: Path) -> dict[str, Listing]:
    """Return both domains: renders as `source`, photographs as `target`.

    Raises:
        DataError: A list is missing, damaged, or names a file outside its folder.
    """
    return {
        "source": read_visda_list(root / "train"),
        "target": read_visda_list(root / "validation"),
    }


def load_task(root: str | None, **settings: Any) -> Task:
    """Load the images and the pretrained network.

    Args:
        root: Folder that holds `train/` and `validation/`; None if a store stands for it.
        **settings: Those of `build_image_task`.

    Raises:
        DataError: Images, store or weights cannot be used.
    """
    listings = None if root is None else list_images(Path(root))
    return build_image_task(TASK_ID, listings, classes=VISDA_CLASSES, **settings)
