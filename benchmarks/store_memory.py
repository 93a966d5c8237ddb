"""Memory of a process that trains from an image store, for a small store and one ten times larger.

    python -m benchmarks.store_memory        # about 5 minutes

Each size runs in a process of its own: a drawn tree of images is prepared, then ResNet-18 trains on
the store for as many inner steps as visit every image of the larger one. Reported are the peak
of the whole process (VmHWM) and, as it grows with what is read, the growth over the training. The
training is augmented: without augmentation a process also remembers the teacher's outputs for
every training image, and what these would take is printed beside it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SIZE = 128  # pixels; 49,152 bytes an image
BATCH = 32
SMALL = 40  # images per class and domain


def peak_mib() -> float:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def train(folder: Path, per_class: int, steps: int) -> None:
    """Prepare a store and train on it; print its size and this process's memory."""
    import torch

    from asg_env.build import build_trainer
    from asg_env.task_settings import ImageFolderSettings
    from asg_env.tasks import image_folder
    from asg_env.tasks.miniature import write_class_folders
    from asg_env.tasks.preparation import prepare
    from asg_env.validation import validate

    torch.set_num_threads(1)
    write_class_folders(folder / "source", folder / "target", per_class, seed=0)
    listings = image_folder.list_images(folder / "source", folder / "target", target_labels=True)
    prepare(listings, folder / "store", SIZE, 2, 0.0, lambda *_: None)
    settings = validate(
        ImageFolderSettings,
        {
            "store": str(folder / "store"),
            "image_size": SIZE,
            "backbone": "torchvision:resnet18",
            "weights": "random",
            "batch_size": BATCH,
            "reward": "train_loss",
            "augmentation": "flip-crop",  # so that no teacher outputs are remembered
            "outer_valid_size": 8,
        },
        "env",
    )
    trainer = build_trainer("ASG/ImageFolder-v0", settings)
    groups = len(trainer.layer_groups)
    trainer.run(10, [0.01] * groups)  # what training itself takes
    before = peak_mib()
    trainer.run(steps, [0.01] * groups)
    stored = sum(len(listing) for listing in listings.values()) * SIZE * SIZE * 3 / 2**20
    print(
        f"store {stored:.0f} MiB, read at once {BATCH * SIZE * SIZE * 3 / 2**20:.1f} MiB: peak of "
        f"the process {peak_mib():.0f} MiB, of which {peak_mib() - before:+.1f} MiB while "
        f"{steps} inner steps read {steps * BATCH} images",
        flush=True,
    )
    images = len(trainer.splits["train"])
    classes = len(trainer.optimizee.old_head.get_parameter("weight"))
    print(
        f"with augmentation none also {images * classes * 4 / 2**20:.1f} MiB of teacher outputs: "
        f"{images} images, {classes} float32 numbers each",
        flush=True,
    )


def main() -> None:
    """Run both sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-class", type=int, help="run one size here, for use by this script")
    arguments = parser.parse_args()
    if arguments.per_class is not None:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), arguments.per_class, steps=10 * SMALL * 4 // BATCH)
        return
    for per_class in (SMALL, 10 * SMALL):
        command = [sys.executable, "-m", "benchmarks.store_memory", "--per-class", str(per_class)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
