"""Images per second of our inner step, a bare loop and a naive loop, side by side in one run.

    python -m benchmarks.cuda              # ResNet-101 at 224 pixels, batches of 32 and 128, CUDA
    python -m benchmarks.cuda --cpu        # ResNet-18 at 64 pixels, batches of 32, one CPU thread
    python -m benchmarks.cuda --dry-run    # the CPU figure with too few steps to mean anything

The three loops take the same losses (cross-entropy and the KL term), on images that are resident
on the device:

- ours: `Trainer.run`, its telemetry and divergence check included;
- bare: plain PyTorch with all the means that ours uses (channels-last, remembered teacher
  outputs, multi-tensor or fused optimizer, bfloat16 on CUDA), and nothing else;
- naive: plain PyTorch as it is often written, in float32 with PyTorch's default memory format,
  the teacher's forward pass at every step, one `.item()` a step, an optimizer that loops over
  the parameters in Python.

Weights and images are random: they do not change the time.
"""

import argparse
import copy
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asg_env.core.augmentation import AugmentationName
from asg_env.core.data import HostImages, Split
from asg_env.core.layer_groups import build_param_groups
from asg_env.core.numerics import Precision, autocast, kernels
from asg_env.core.optimizee import Optimizee
from asg_env.core.trainer import Trainer, TrainerSettings
from asg_env.tasks.backbones import Pretrained, load_pretrained
from benchmarks.timing import interleave, write_json

Loop = Callable[[], Iterator[None]]  # yields after each window

CLASSES, KL_WEIGHT, RATE, MOMENTUM, DECAY = 12, 0.1, 1e-4, 0.9, 5e-4
IMAGES = 512  # resident; batches are drawn from them


@dataclass(frozen=True)
class Plan:
    """What is measured: where, on what, and for how long."""

    device: torch.device
    backbone: str
    image_size: int
    precision: Precision
    batch_size: int
    window: int  # inner steps
    windows: int


def build_optimizee(pretrained: Pretrained) -> Optimizee:
    """Return the network with the original's head, in PyTorch's default memory format."""
    features = pretrained.old_head.in_features
    head = nn.Sequential(nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    return Optimizee(copy.deepcopy(pretrained.backbone), head, pretrained.old_head)


def random_images(plan: Plan, pretrained: Pretrained, on_host: bool = False) -> Split:
    """Return random labelled images, channels-last as a store holds them.

    With `on_host` they are read batch by batch, as those of a store that does not fit.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, plan.image_size, plan.image_size, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pretrained.mean, pretrained.std))
    stored: Tensor | HostImages = images.permute(0, 3, 1, 2)
    if on_host:
        pixels = images.numpy()
        size = (3, plan.image_size, plan.image_size)
        stored = HostImages(lambda rows: pixels[rows], np.arange(IMAGES), size, cheap=False)
    return Split(stored, labels, mean, std).to(plan.device)


def batches(plan: Plan) -> list[Tensor]:
    """Indices of every inner step, drawn beforehand."""
    generator = torch.Generator().manual_seed(1)
    steps = plan.window * plan.windows
    return [
        torch.randint(IMAGES, (plan.batch_size,), generator=generator).to(plan.device)
        for _ in range(steps)
    ]


def build_trainer(
    plan: Plan, pretrained: Pretrained, data: Split, augmentation: AugmentationName = "none"
) -> Trainer:
    """Return our trainer around the network."""
    settings = TrainerSettings(
        base_lr=RATE,
        total_steps=plan.window * plan.windows,
        batch_size=plan.batch_size,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        augmentation=augmentation,
        precision=plan.precision,
    )
    optimizee = build_optimizee(pretrained).to(memory_format=torch.channels_last)
    groups, splits = pretrained.layer_groups, {"train": data}
    return Trainer(optimizee, groups, splits, settings, {"kl": KL_WEIGHT}, plan.device)


def ours(plan: Plan, pretrained: Pretrained, data: Split) -> Loop:
    """Train through `Trainer.run`, window by window."""
    trainer = build_trainer(plan, pretrained, data)

    def run() -> Iterator[None]:
        for _ in range(plan.windows):
            trainer.run(plan.window, [1.0] * len(trainer.layer_groups))
            yield

    return run


def bare(plan: Plan, pretrained: Pretrained, data: Split) -> Loop:
    """Train plainly, with every means that makes it fast."""
    model = build_optimizee(pretrained).to(plan.device).to(memory_format=torch.channels_last)
    labels, chosen = data.known_labels(), batches(plan)
    with torch.no_grad(), autocast(plan.precision, plan.device):
        logits = [model(data.batch(slice(i, i + 64)))[1] for i in range(0, IMAGES, 64)]
    teacher = F.log_softmax(torch.cat(logits).float(), dim=1)
    fused = plan.device.type == "cuda"
    optimizer = torch.optim.SGD(
        build_param_groups(model, pretrained.layer_groups, RATE),
        momentum=MOMENTUM,
        weight_decay=DECAY,
        fused=fused,
        foreach=not fused,
    )

    def run() -> Iterator[None]:
        for window in range(plan.windows):
            with kernels(False, plan.device):
                for index in chosen[window * plan.window : (window + 1) * plan.window]:
                    with autocast(plan.precision, plan.device):
                        logits, old_logits = model(data.batch(index))
                    ce = F.cross_entropy(logits.float(), labels[index])
                    old = F.log_softmax(old_logits.float(), dim=1)
                    kl = F.kl_div(old, teacher[index], log_target=True, reduction="batchmean")
                    optimizer.zero_grad()
                    (ce + KL_WEIGHT * kl).backward()
                    optimizer.step()
            _wait(plan.device)
            yield

    return run


def naive(plan: Plan, pretrained: Pretrained, data: Split) -> Loop:
    """Train as it is often written."""
    model = build_optimizee(pretrained).to(plan.device)
    teacher = copy.deepcopy(model).requires_grad_(False)
    labels, chosen = data.known_labels(), batches(plan)
    optimizer = torch.optim.SGD(
        build_param_groups(model, pretrained.layer_groups, RATE),
        momentum=MOMENTUM,
        weight_decay=DECAY,
        foreach=False,
    )

    def run() -> Iterator[None]:
        for window in range(plan.windows):
            for index in chosen[window * plan.window : (window + 1) * plan.window]:
                images = data.batch(index).contiguous()
                logits, old_logits = model(images)
                with torch.no_grad():
                    target = F.softmax(teacher(images)[1], dim=1)
                ce = F.cross_entropy(logits, labels[index])
                kl = F.kl_div(F.log_softmax(old_logits, dim=1), target, reduction="batchmean")
                loss = ce + KL_WEIGHT * kl
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            yield

    return run


def host_waits(
    plan: Plan, pretrained: Pretrained, data: Split, augmentation: AugmentationName = "none"
) -> int:
    """How often the host waits for the device in a window: once, for the telemetry, is the aim.

    `randaugment` misses it: torchvision moves the matrix of each shear, rotation and translation
    to the device by a copy that waits.
    """
    trainer = build_trainer(plan, pretrained, data, augmentation)
    ones = [1.0] * len(trainer.layer_groups)
    trainer.run(plan.window, ones)  # chooses kernels, and remembers the teacher's outputs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.run(plan.window, ones)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Switching the mode on warns too, that it is a prototype.
    waits = "called a synchronizing CUDA operation"
    return sum(waits in str(warning.message) for warning in caught)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(plan: Plan, repeats: int) -> dict[str, list[float]]:
    """Seconds of each loop per repeat."""
    pretrained = load_pretrained(plan.backbone, "random", plan.image_size)
    data = random_images(plan, pretrained)
    if plan.device.type == "cuda":
        on_host = random_images(plan, pretrained, on_host=True)
        waits = {
            "resident images": host_waits(plan, pretrained, data),
            "host images": host_waits(plan, pretrained, on_host),
            "flip-crop": host_waits(plan, pretrained, data, "flip-crop"),
        }
        said = ", ".join(f"{count} ({case})" for case, count in waits.items())
        print(f"host waits in a window of our trainer: {said}")
    loops = [build(plan, pretrained, data) for build in (ours, bare, naive)]
    clock = time.perf_counter if plan.device.type == "cuda" else time.process_time
    times = interleave(loops, repeats, clock)
    return dict(zip(("ours", "bare", "naive"), times, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the small figure, on one thread")
    parser.add_argument("--dry-run", action="store_true", help="as --cpu, a few steps only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}; raise it")
    on_cpu = arguments.cpu or arguments.dry_run
    if not on_cpu and not torch.cuda.is_available():
        parser.error("no CUDA device is here; add --cpu for the figure without one")
    if on_cpu:
        torch.set_num_threads(1)
        size, windows = (2, 1) if arguments.dry_run else (5, 4)
        small = (torch.device("cpu"), "torchvision:resnet18", 64, "float32")
        plans = [Plan(*small, 32, size, windows)]  # type: ignore[arg-type]
    else:
        large = (torch.device("cuda"), "torchvision:resnet101", 224, "bfloat16")
        plans = [Plan(*large, batch, 20, 4) for batch in (32, 128)]  # type: ignore[arg-type]
    raw = {}
    for plan in plans:
        seconds = measure(plan, 1 if arguments.dry_run else arguments.repeats)
        images = plan.batch_size * plan.window * plan.windows
        print(
            f"{plan.backbone}, {plan.image_size} pixels, batch {plan.batch_size}, {plan.device}: "
            + ", ".join(
                f"{n} {images / statistics.median(t):.0f} images/s" for n, t in seconds.items()
            )
        )
        for other in ("bare", "naive"):
            ratios = [a / b for a, b in zip(seconds[other], seconds["ours"], strict=True)]
            print(
                f"  ours is {statistics.median(ratios):.2f} times as fast as {other} "
                f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} repeats)"
            )
        raw[f"batch {plan.batch_size}"] = seconds
        write_json(arguments.out, {"seconds": raw})  # now, as a later plan may fail
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.2f} GiB")
    if not on_cpu:
        print(f"peak memory of the device {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
