"""Image stores: a folder with the decoded, resized images of some domains, to be memory-mapped.

Layout: `{domain}.u8` holds the images' bytes (N, S, S, 3) and nothing else, `{domain}.txt` a line
with path, tab and label per image, `manifest.json` the rest. The manifest is written last: a
folder without it is unfinished. `asg_env.tasks.preparation` writes stores.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from asg_env.tasks.listing import DataError, Listing, check_same_classes

FORMAT = "asg-env image store"
VERSION = 1  # raise when bytes of the same images change, or the layout
MANIFEST = "manifest.json"
PROGRESS = "progress.jsonl"


class BrokenImageError(DataError):
    """The bytes of an image file are no picture, or only a part of one."""


def describe_transform(size: int) -> dict[str, Any]:
    """What `load_image` does, for the manifest."""
    return {
        "colour": "RGB",
        "exif_orientation": "ignored",
        "resize": "shorter side to size, bilinear, antialias",
        "crop": "center",
        "size": size,
    }


def load_image(path: Path, size: int) -> np.ndarray:
    """Decode, resize and crop an image as the original does for VisDA-17.

    The EXIF orientation is not applied and transparency is dropped, as is usual in training.

    Args:
        path: The image file.
        size: S: the shorter side is resized to it, then the centre is cropped, in pixels.

    Returns:
        uint8 of shape (S, S, 3).

    Raises:
        BrokenImageError: The bytes are no picture; a truncated file counts as none.
        DataError: The file cannot be read.
    """
    from torchvision.transforms import v2  # slow to import

    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend that first") from None
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            picture = opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # the file was read: whatever a decoder raises, the content did it
        unknown = isinstance(error, UnidentifiedImageError)  # its text names a memory address
        raise BrokenImageError(
            f"{path} is no readable image ({'unknown format' if unknown else error}); replace it "
            "or take it off the list"
        ) from None
    resized = v2.functional.resize(
        picture, [size], interpolation=v2.InterpolationMode.BILINEAR, antialias=True
    )
    return np.array(v2.functional.center_crop(resized, [size, size]))


def describe(listings: Mapping[str, Listing], size: int) -> dict[str, Any]:
    """What a store of these images says of itself before any is decoded.

    Raises:
        DataError: An image file is missing, or labelled domains have different classes.
    """
    labelled = [listing for listing in listings.values() if listing.labels is not None]
    for other in labelled[1:]:
        check_same_classes(labelled[0], other)
    return {
        "format": FORMAT,
        "version": VERSION,
        "transform": describe_transform(size),
        "classes": list(labelled[0].classes) if labelled else [],
        "versions": {name: metadata.version(name) for name in ("pillow", "torchvision")},
        "domains": {
            name: {
                "root": str(listing.root),
                "images": len(listing),
                "fingerprint": listing.fingerprint(),
            }
            for name, listing in listings.items()
        },
    }


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name what two descriptions disagree on; roots and package versions may differ."""
    old, new = stored["domains"], wanted["domains"]
    found = []
    if stored["version"] != wanted["version"]:
        found.append(f"the version ({stored['version']} there, {wanted['version']} here)")
    if stored["transform"] != wanted["transform"]:
        sizes = (stored["transform"]["size"], wanted["transform"]["size"])
        found.append(f"the transform ({sizes[0]} pixels there, {sizes[1]} here)")
    if stored["classes"] != wanted["classes"]:
        found.append("the classes")
    if set(old) != set(new):
        found.append(f"the domains ({', '.join(old)} there, {', '.join(new)} here)")
    for name in new:
        if name in old and old[name]["fingerprint"] != new[name]["fingerprint"]:
            counts = (old[name]["images"], new[name]["images"])
            how = f"{counts[0]} there, {counts[1]} here"
            if counts[0] == counts[1]:
                how = "files or labels changed"
            found.append(f"the images of {name} ({how})")
    return found


def image_bytes(size: int) -> int:
    """Bytes of one stored image."""
    return size * size * 3


@dataclass(frozen=True)
class Store:
    """A finished image store, opened for reading.

    Attributes:
        folder: Where it is.
        manifest: What `manifest.json` says.
        digest: SHA-256 over images, paths, labels and classes of all domains: two machines with
            one digest share the data.
    """

    folder: Path
    manifest: dict[str, Any]
    digest: str

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a store.

        Raises:
            DataError: There is none, it is unfinished, damaged, or of another version.
        """
        folder = folder.absolute()
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; make the image store with `asg prepare`")
        file = folder / MANIFEST
        if not file.exists():
            raise DataError(
                f"{folder} has no {MANIFEST}, so it is unfinished or no image store; run "
                "`asg prepare` again to finish it"
            )
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            cls._check_files(folder, manifest)
            content = {
                name: [domain["digest"], domain["list_digest"], domain["broken"]]
                for name, domain in manifest["domains"].items()
            }
            text = json.dumps([manifest["classes"], content], sort_keys=True)
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read ({error.strerror}); mend that first"
            ) from None
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{file} is damaged; delete {folder} and run `asg prepare` again"
            ) from None
        return cls(folder, manifest, hashlib.sha256(text.encode()).hexdigest())

    @staticmethod
    def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
        kind = (manifest["format"], manifest["version"])
        if kind != (FORMAT, VERSION):
            raise DataError(
                f"{folder} must be an '{FORMAT}' of version {VERSION}, got '{kind[0]}' of version "
                f"{kind[1]}; run `asg prepare` again into a new folder"
            )
        for name, domain in manifest["domains"].items():
            file = folder / f"{name}.u8"
            expected = domain["images"] * image_bytes(manifest["transform"]["size"])
            if (actual := file.stat().st_size) != expected:
                raise DataError(
                    f"{file} must have {expected} bytes, got {actual}; delete {folder} and run "
                    "`asg prepare` again"
                )
            lines = (folder / f"{name}.txt").read_bytes()
            if hashlib.sha256(lines).hexdigest() != domain["list_digest"]:
                raise DataError(
                    f"{folder / name}.txt was changed; delete {folder} and run `asg prepare` again"
                )

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        size: int = self.manifest["transform"]["size"]
        return size

    def images(self, domain: str) -> np.memmap[Any, np.dtype[np.uint8]]:
        """Map all images of a domain, read-only, uint8 of shape (N, S, S, 3); broken ones are 0."""
        shape = (self.manifest["domains"][domain]["images"], self.size, self.size, 3)
        return np.memmap(self.folder / f"{domain}.u8", np.uint8, "r", shape=shape)

    def rows(self, domain: str) -> np.ndarray:
        """Rows of `images` that are not broken, int64, ascending."""
        return self._whole_and_rows(domain)[1]

    def listing(self, domain: str) -> Listing:
        """Return the listing of the images at `rows`."""
        whole, rows = self._whole_and_rows(domain)
        return whole.select(rows)

    def _whole_and_rows(self, domain: str) -> tuple[Listing, np.ndarray]:
        description = self.manifest["domains"][domain]
        text = (self.folder / f"{domain}.txt").read_text(encoding="utf-8")
        lines = [line.split("\t") for line in text.split("\n")[:-1]]
        labelled = lines[0][1] != "-"
        whole = Listing(
            Path(description["root"]),
            tuple(path for path, _ in lines),
            tuple(int(label) for _, label in lines) if labelled else None,
            tuple(self.manifest["classes"]) if labelled else (),
        )
        broken = set(description["broken"])
        return whole, np.flatnonzero([path not in broken for path in whole.paths])

    def check(self, listings: Mapping[str, Listing], size: int) -> None:
        """Refuse to stand in for images that are not the ones stored here.

        Args:
            listings: The images as they are now, by domain.
            size: Wanted height and width in pixels.

        Raises:
            DataError: Image size, classes or files differ.
        """
        if size != self.size:
            raise DataError(
                f"{self.folder} holds images of {self.size} pixels, got an image size of {size}; "
                f"run `asg prepare` with --image-size {size}, or set env.image_size to {self.size}"
            )
        found = differences(self.manifest, describe(listings, size))
        if found:
            raise DataError(
                f"{self.folder} is stale: it differs in {', '.join(found)}; run `asg prepare` "
                "again into a new folder"
            )
