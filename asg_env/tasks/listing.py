"""Listings: which image files a domain has, and what they show.

Three layouts are read: VisDA-17's `image_list.txt`, one sub-folder per class, and images alone.
Reading a listing opens no image.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path, PurePosixPath

import numpy as np

# Label ids of VisDA-17, in the order of its lists.
VISDA_CLASSES = (
    *("aeroplane", "bicycle", "bus", "car", "horse", "knife"),
    *("motorcycle", "person", "plant", "skateboard", "train", "truck"),
)
VISDA_LIST = "image_list.txt"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
# Control characters would break the line format of a store's list; surrogates stand for file
# names that are no UTF-8.
_UNUSABLE = re.compile("[\x00-\x1f\ud800-\udfff]")


class DataError(ValueError):
    """The user's data cannot be used; the message is one sentence that says how to mend it."""


@dataclass(frozen=True)
class Listing:
    """The images of one domain.

    Attributes:
        root: Folder that the paths are relative to, absolute.
        paths: POSIX paths of the N images, each once.
        labels: N positions within `classes`; None if the images are unlabelled.
        classes: Class names by label; empty if the images are unlabelled.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Iterable[int]) -> "Listing":
        """Return the images at `rows`, in that order."""
        rows = [int(row) for row in rows]
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
        )

    def rows_of_text(self) -> Iterator[tuple[str, str]]:
        """Yield path and label of every image, as text; `-` for no label."""
        labels = repeat("-", len(self)) if self.labels is None else map(str, self.labels)
        yield from zip(self.paths, labels, strict=True)

    def fingerprint(self) -> str:
        """SHA-256 over path, label, size and modification time of every image.

        It notices an added, removed, relabelled or rewritten file without reading any, and
        survives moving the whole tree.

        Raises:
            DataError: A file is missing or may not be looked at.
        """
        sha = hashlib.sha256()
        missing = []
        for path, label in self.rows_of_text():
            file = os.path.join(self.root, path)
            try:
                status = os.stat(file)
            except (FileNotFoundError, NotADirectoryError):
                missing.append(file)
            except OSError as error:
                raise _unreadable(error) from None
            else:
                sha.update(f"{path}\t{label}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
        if missing:
            raise DataError(
                f"{missing[0]} is missing ({len(missing)} of the {len(self)} listed images are); "
                "unpack the data again, or take them off the list"
            )
        return sha.hexdigest()


def read_visda_list(folder: Path) -> Listing:
    """Read a domain of VisDA-17: `image_list.txt` with a path and a label from 0 to 11 a line.

    Args:
        folder: `train` or `validation`; the paths in the list are relative to it.

    Raises:
        DataError: The list is missing or not such a list.
    """
    folder = folder.absolute()
    file = folder / VISDA_LIST
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{file} is missing; give the folder that holds train/ and validation/ of VisDA-17"
        ) from None
    except OSError as error:
        raise _unreadable(error) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} must be UTF-8 text, got byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}; save it as UTF-8"
        ) from None
    ids = {str(label): label for label in range(len(VISDA_CLASSES))}
    labels: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"line {number} of {file}"
        if len(fields) != 2:
            raise DataError(f"{where} must hold a path and a label, got {line!r}; mend the line")
        path, label = PurePosixPath(fields[0]), fields[1]
        if label not in ids:
            raise DataError(
                f"{where} must have an integer from 0 to {len(ids) - 1} as label, got '{label}'; "
                "mend the label"
            )
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{where} must name an image inside {folder}, got '{path}'; make the path "
                "relative to that folder"
            )
        if path.as_posix() in labels:
            raise DataError(f"{where} repeats '{path}'; remove one of the two lines")
        _check_name(path.as_posix(), folder)
        labels[path.as_posix()] = ids[label]
    if not labels:
        raise DataError(f"{file} lists no images; unpack the data again")
    return Listing(folder, tuple(labels), tuple(labels.values()), VISDA_CLASSES)


def scan_class_folders(root: Path) -> Listing:
    """List a tree with one sub-folder per class, at whatever depth the images lie within it.

    Classes are numbered in the order of their names. Hidden files and folders, files that have
    no image suffix and images outside the class folders are left out.

    Raises:
        DataError: There are no class folders, or one of them has no images.
    """
    root = root.absolute()
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{root} is no folder; give one that holds a folder per class") from None
    except OSError as error:
        raise _unreadable(error) from None
    classes = tuple(sorted(name for name in names if not name.startswith(".")))
    if not classes:
        raise DataError(
            f"{root} holds no class folders; put the images of each class into a folder that is "
            "named after it"
        )
    found = [_images_below(root / name, root) for name in classes]
    for name, images in zip(classes, found, strict=True):
        if not images:
            raise DataError(
                f"{root / name} holds no images ({' '.join(IMAGE_SUFFIXES)}); add some, or remove "
                "the folder"
            )
    return Listing(
        root,
        tuple(path for images in found for path in images),
        tuple(label for label, images in enumerate(found) for _ in images),
        classes,
    )


def scan_unlabelled(root: Path) -> Listing:
    """List all images below `root`, without labels; hidden files and folders are left out.

    Raises:
        DataError: There are no images.
    """
    root = root.absolute()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give one that holds images")
    images = _images_below(root, root)
    if not images:
        raise DataError(f"{root} holds no images ({' '.join(IMAGE_SUFFIXES)}); add some")
    return Listing(root, tuple(images), None, ())


def check_same_classes(source: Listing, target: Listing) -> None:
    """Refuse two labelled domains whose classes differ.

    Raises:
        DataError: A class is in one domain only.
    """
    parts = [
        f"only {here.root} has {', '.join(only)}"
        for here, there in ((source, target), (target, source))
        if (only := sorted(set(here.classes) - set(there.classes)))
    ]
    if parts:
        raise DataError(
            f"source and target must have the same classes, but {' and '.join(parts)}; rename or "
            "remove these"
        )


def stratified_division(
    listing: Listing, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide a listing in two parts with the same share of every class.

    Within a class, images are ordered by the SHA-256 of `{seed}/{path}` and the first
    round(fraction * n) of its n go to the first part, at least one to either part. So the
    division does not depend on the order of the list, and when an image is removed at most one
    other of its class changes sides. Unlabelled images count as one class.

    Args:
        listing: What to divide.
        fraction: Share of the first part, in [0, 1); with 0 it is empty.
        seed: Any integer; another one gives another division.

    Returns:
        Rows of the first part and of the rest, int64, ascending.

    Raises:
        DataError: A class has fewer than two images.
        ValueError: The fraction is out of bounds.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"`fraction` must be >= 0 and < 1, got {fraction}")
    labels = np.zeros(len(listing), np.int64) if listing.labels is None else listing.labels
    first = np.zeros(len(listing), bool)
    if fraction > 0:
        keys = [hashlib.sha256(f"{seed}/{path}".encode()).digest() for path in listing.paths]
        for label, name in enumerate(listing.classes or ("(unlabelled)",)):
            rows = np.flatnonzero(np.equal(labels, label))
            if len(rows) < 2:
                raise DataError(
                    f"class {name} of {listing.root} must have at least 2 images to be divided, "
                    f"got {len(rows)}; add some, or set the fraction to 0"
                )
            count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
            first[sorted(rows, key=keys.__getitem__)[:count]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)


def _images_below(folder: Path, root: Path) -> list[str]:
    """Paths of the images below `folder`, relative to `root`, sorted; links are followed."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    images = []
    visited = set()
    for base, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(base)
        if real in visited:  # a loop, or the same images twice
            raise DataError(f"{base} links to a folder that is listed already; remove the link")
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(base).relative_to(root)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                images.append((inside / name).as_posix())
                _check_name(images[-1], root)
    return sorted(images)


def _check_name(path: str, root: Path) -> None:
    if _UNUSABLE.search(path):
        raise DataError(
            f"{root} has an image called {path!r}, a name with control characters or not in UTF-8; "
            "rename it"
        )


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read ({error.strerror}); mend that first")
