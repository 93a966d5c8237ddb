"""Miniature data sets in the layouts of real ones: drawn shapes, for trying things out and tests.

`python -m asg_env.tasks.miniature visda17 DIR` writes a VisDA-17 of a few hundred images.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from asg_env.core.seeding import numpy_generator
from asg_env.tasks.listing import VISDA_CLASSES, VISDA_LIST

FOLDER_CLASSES = ("cross", "disc", "star", "triangle")
IMAGES = 24  # per class and domain
IMAGE_SIZE = 48  # pixels


def _polygon(corners: int, radii: tuple[float, ...]) -> np.ndarray:
    """Corners around the origin at radii that repeat, shape (corners, 2)."""
    angles = 2 * np.pi * np.arange(corners) / corners
    corner = np.array([np.cos(angles), np.sin(angles)]).T
    return np.asarray(corner * np.resize(radii, (corners, 1)))


_HALF_CROSS = np.array([[3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1]]) / 3.2
SHAPES = (
    np.concatenate([_HALF_CROSS, -_HALF_CROSS]),
    _polygon(36, (0.9,)),  # a disc
    _polygon(10, (1.0, 0.45)),  # a star
    _polygon(3, (1.0,)),  # a triangle
)


def write_visda_tree(
    root: Path, train: int, validation: int, seed: int, size: int = IMAGE_SIZE
) -> None:
    """Write a miniature VisDA-17: its folders, file names and lists, with drawn pictures.

    Args:
        root: Folder that gets `train` and `validation`.
        train: Synthetic images of each of the 12 classes.
        validation: Real ones of each.
        seed: Seed of everything drawn.
        size: Shorter side in pixels.
    """
    for split, count in (("train", train), ("validation", validation)):
        lines = []
        for label, name in enumerate(VISDA_CLASSES):
            generator = numpy_generator(seed, "miniature", split, name)
            (root / split / name).mkdir(parents=True, exist_ok=True)
            category = generator.integers(10**7)
            for number in range(count):
                if split == "train":
                    yaw, light, pitch = generator.integers(0, 360, 3)
                    model = f"src_{1 + number % 2}_{category:08d}_{generator.bytes(16).hex()}"
                    path = f"{name}/{model}__{yaw}_{light}_{pitch}.png"
                else:
                    path = f"{name}/{name}_{1363018 + 7 * number}.jpg"
                picture = draw(label, split == "validation", size, generator)
                picture.save(root / split / path)
                lines.append(f"{path} {label}\n")
        (root / split / VISDA_LIST).write_text("".join(lines), encoding="utf-8")


def write_class_folders(
    source: Path, target: Path, images: int, seed: int, size: int = IMAGE_SIZE
) -> None:
    """Write two trees with one folder for each of four classes: clean and photograph-like shapes.

    Args:
        source: Folder of the synthetic images.
        target: Folder of the real ones.
        images: Images per class and domain.
        seed: Seed of everything drawn.
        size: Shorter side in pixels.
    """
    for root, domain, suffix in ((source, "source", ".png"), (target, "target", ".jpg")):
        for label, name in enumerate(FOLDER_CLASSES):
            generator = numpy_generator(seed, "miniature", domain, name)
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(images):
                picture = draw(label, domain == "target", size, generator)
                picture.save(root / name / f"{number:04d}{suffix}")


def draw(label: int, real: bool, size: int, generator: np.random.Generator) -> Image.Image:
    """Draw one image of a class: shape label % 4, and a hue of its own for each of 12 labels.

    A synthetic one is flat: one colour on even grey, with the light varied. A real one stands
    on a patchwork of colours and is paler, blurred and noisy, so that a network that learns the
    source alone loses accuracy on it.

    Args:
        label: From 0 to 11.
        real: Which of the two to draw.
        size: Shorter side in pixels; the longer one is a quarter longer.
        generator: Where position, size, rotation, colours and noise come from.
    """
    width, height = (size * 5 // 4, size) if generator.random() < 0.5 else (size, size * 5 // 4)
    hue = (label % 4 + label // 4 / 3) / 4
    if real:
        patches = generator.integers(40, 216, (5, 5, 3)).astype(np.uint8)
        picture = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
        hue += generator.uniform(-0.03, 0.03)
        saturation = generator.uniform(0.4, 0.8)
    else:
        picture = Image.new("RGB", (width, height), (int(generator.integers(190, 220)),) * 3)
        saturation = 0.9
    value = generator.uniform(0.6, 1.0)
    colour = tuple(int(255 * part) for part in (hue % 1, saturation, value))
    angle = generator.uniform(-0.4, 0.4)  # radians
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([width, height]) * generator.uniform(0.4, 0.6, 2)
    corners = SHAPES[label % 4] @ turn * size * generator.uniform(0.28, 0.42) + centre
    fill = Image.new("HSV", (1, 1), colour).convert("RGB").getpixel((0, 0))
    ImageDraw.Draw(picture).polygon([tuple(corner) for corner in corners.tolist()], fill=fill)
    if not real:
        return picture
    blurred = picture.filter(ImageFilter.GaussianBlur(generator.uniform(0.5, 1.2)))
    noise = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write a miniature data set; see `--help`."""
    parser = argparse.ArgumentParser(description="Write a miniature data set of drawn shapes.")
    parser.add_argument("kind", choices=("visda17", "imagefolder"))
    parser.add_argument(
        "folder", type=Path, help="gets train/ and validation/, or source/, target/"
    )
    parser.add_argument("--images", type=int, default=IMAGES, help="per class and domain")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.images < 1:
        parser.error(f"--images must be >= 1, got {given.images}")
    if given.kind == "visda17":
        write_visda_tree(given.folder, given.images, given.images, given.seed)
    else:
        write_class_folders(
            given.folder / "source", given.folder / "target", given.images, given.seed
        )
    print(f"written: {given.folder}")


if __name__ == "__main__":
    main()
