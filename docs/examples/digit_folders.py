"""What the examples of reuse share: folders of images, a pretrained network, a fair comparison.

    python docs/examples/digit_folders.py digits

writes 32 x 32 PNG files: `pretrain/0` to `pretrain/4`, scans of handwritten digits; `train/5` to
`train/9`, digits drawn with fonts; `valid` and `test`, scans of handwritten 5 to 9.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from asg_env.files import replacing
from asg_env.schedule import LearnedSchedule

SPLITS = {"pretrain": "teacher_train", "train": "train", "valid": "outer_valid", "test": "test"}
BATCH = 32
TUNING_SEED = 1000  # of the trainings that choose a rate; no seed of the comparison
Train = Callable[[float, bool, int], tuple[float, float]]


def write_folders(root: Path) -> None:
    """Write the images, ten classes in all."""
    from asg_env.tasks.digit_images import load_images

    arrays = load_images(image_size=32)
    for folder, split in SPLITS.items():
        first = 0 if folder == "pretrain" else 5
        for number, (image, label) in enumerate(
            zip(arrays[f"{split}/images"], arrays[f"{split}/labels"], strict=True)
        ):
            place = root / folder / str(first + label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(place / f"{number:04d}.png")


def load(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return a folder's images, normalised, (N, 3, 32, 32), and their labels, (N,)."""
    if not (root / split).is_dir():
        sys.exit(f"{root / split} is no folder; python docs/examples/digit_folders.py {root}")
    to_tensor = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )
    images, labels = zip(*ImageFolder(root / split, to_tensor), strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches(data: tuple[Tensor, Tensor], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, as many as asked for."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat((order, torch.randperm(len(data[1]), generator=generator)))
        chosen, order = order[:BATCH], order[BATCH:]
        yield data[0][chosen], data[1][chosen]


def pretrained(
    build: Callable[[], nn.Module],
    logits: Callable[[nn.Module, Tensor], Tensor],
    given: argparse.Namespace,
) -> nn.Module:
    """Return the network trained on `pretrain`, from the file where it is kept."""
    torch.manual_seed(0)
    model, steps = build(), 4 * given.steps
    path = given.folder / f"pretrained-{type(model).__name__}-{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    data = load(given.folder, "pretrain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for images, labels in batches(data, steps, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(logits(model, images), labels).backward()
        optimizer.step()
        decay.step()
    with replacing(path) as temporary:  # whole, or not there
        torch.save(model.state_dict(), temporary)
    return model


@torch.no_grad()
def accuracy(predict: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
    """Share of images whose largest logit is that of their class."""
    hits = [predict(i).argmax(1) == t for i, t in zip(*(d.split(256) for d in data), strict=True)]
    return torch.cat(hits).float().mean().item()


def arguments(description: str) -> argparse.Namespace:
    """Read what all examples take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="made by docs/examples/digit_folders.py")
    shipped = Path(__file__).with_name("schedule.json")
    parser.add_argument("--schedule", default=shipped, help="of asg export; the shipped one")
    parser.add_argument("--steps", type=int, default=150, help="inner steps of a training")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind")
    given = parser.parse_args()
    for name in ("steps", "seeds"):
        if getattr(given, name) < 2:
            parser.error(f"--{name} must be >= 2, got {getattr(given, name)}")
    try:
        given.schedule = LearnedSchedule.load(given.schedule)
    except ValueError as error:
        parser.error(str(error))
    return given


def compare(train: Train, rates: tuple[float, ...], seeds: int) -> None:
    """Train with one rate for all layers, and with the schedule, and print test accuracies.

    Both have the same parameter groups, and the base rate of `rates` that does best on `valid` in
    one training more.

    Args:
        train: Base rate, whether by the schedule, seed -> accuracy on `valid` and on `test`.
        rates: Candidates, ascending.
        seeds: Trainings of each.
    """
    found = {}
    for name, scheduled in (("one rate", False), ("schedule", True)):
        tuning = {rate: train(rate, scheduled, TUNING_SEED)[0] for rate in rates}
        best = max(tuning, key=lambda rate: tuning[rate])
        edge = ", at the edge of those tried" if best in (rates[0], rates[-1]) else ""
        found[name] = np.array([train(best, scheduled, seed)[1] for seed in range(seeds)])
        print(
            f"{name:9} base rate {best:g}{edge}: test accuracy {_interval(found[name])}", flush=True
        )
    print(f"schedule minus one rate: {_interval(found['schedule'] - found['one rate'])}")


def _interval(values: np.ndarray) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = values.mean()
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f}, n = {len(values)})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write folders of digits.")
    parser.add_argument("folder", type=Path)
    write_folders(parser.parse_args().folder)
