"""Labelled images on or near the training device, and the order in which they are visited."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asg_env.core.seeding import torch_generator

# Of the device's free memory, what the images of all processes may take; the rest is for training.
RESIDENT_SHARE = 0.5


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting: from pinned memory, on CUDA."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class HostImages:
    """Images outside the device's memory: read batch by batch, one batch ahead.

    Args:
        read: From rows, int64 of shape (B,), to their pixels, uint8 of shape (B, H, W, C).
        rows: Which rows of the source belong to the split, int64, shape (N,).
        shape: (C, H, W) of an image.
        cheap: Reading is a copy and not a decoding, so that all may be read at once.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        rows: np.ndarray,
        shape: tuple[int, int, int],
        *,
        cheap: bool,
        device: torch.device | None = None,
    ) -> None:
        self._read, self._rows, self.cheap = read, rows, cheap
        self._shape = shape
        self.shape = torch.Size((len(rows), *shape))
        self.device = device or torch.device("cpu")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._ahead: tuple[Tensor | slice, Future[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def prefetch(self, index: Tensor | slice) -> None:
        """Start to read what `gather` will probably be asked for next; it may be asked otherwise.

        Args:
            index: Positions within the split: int64, shape (B,), on the CPU, or a slice.
        """
        self._ahead = (index, self._reader.submit(self._load, index))

    def gather(self, index: Tensor | slice) -> Tensor:
        """Return images as uint8, (B, C, H, W) in channels-last memory, on the device."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and _same(ahead[0], index):
            pixels = ahead[1].result()
        else:
            pixels = self._load(index)
        return to_device(pixels, self.device).permute(0, 3, 1, 2)

    def select(self, rows: Tensor) -> "HostImages":
        """Return the images at `rows`, still unread."""
        return self._with(self._rows[rows.cpu().numpy()], self.device)

    def to(self, device: torch.device) -> "HostImages":
        """Return the same images, to be handed over on `device`."""
        return self._with(self._rows, device)

    def _with(self, rows: np.ndarray, device: torch.device) -> "HostImages":
        return HostImages(self._read, rows, self._shape, cheap=self.cheap, device=device)

    def _load(self, index: Tensor | slice) -> Tensor:
        rows = self._rows[index if isinstance(index, slice) else index.numpy()]
        pixels = torch.from_numpy(self._read(rows))
        # Pinned here, which is the reader's thread unless nothing was read ahead.
        return pixels.pin_memory() if self.device.type == "cuda" else pixels


def _same(ours: Tensor | slice, theirs: Tensor | slice) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    return isinstance(ours, slice) and isinstance(theirs, slice) and ours == theirs


@dataclass(frozen=True)
class Split:
    """One split: bytes, normalised batch by batch.

    Attributes:
        images: uint8, shape (N, C, H, W): a tensor on the training device, or images that are
            read from the host batch by batch.
        labels: int64, shape (N,), on the training device; None where the images have none.
        mean: Pixel mean that is subtracted, in pixel units (0 to 255); one number, or a tensor
            of shape (C, 1, 1).
        std: Pixel standard deviation that is divided by, likewise.
    """

    images: Tensor | HostImages
    labels: Tensor | None
    mean: float | Tensor
    std: float | Tensor

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor | slice) -> Tensor:
        """Return the images at `index` as bytes, shape (B, C, H, W)."""
        if isinstance(self.images, HostImages):
            return self.images.gather(index)
        return self.images[index]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as float32, less the mean, over the standard deviation."""
        return pixels.float().sub_(self.mean).div_(self.std)

    def batch(self, index: Tensor | slice) -> Tensor:
        """Return the images at `index` normalised, float32, shape (B, C, H, W)."""
        return self.normalise(self.pixels(index))

    def known_labels(self) -> Tensor:
        """Return the labels.

        Raises:
            ValueError: The images have none.
        """
        if self.labels is None:
            raise ValueError("the images of this split have no labels")
        return self.labels

    def head(self, size: int) -> "Split":
        """Return the first `size` images after interleaving classes, so that it is balanced."""
        if self.labels is None:
            return self.select(torch.arange(min(size, len(self))))
        rank = torch.zeros_like(self.labels)
        for label in self.labels.unique():
            mask = self.labels == label
            rank[mask] = torch.arange(int(mask.sum()), device=rank.device)
        return self.select(torch.argsort(rank * (int(self.labels.max()) + 1) + self.labels)[:size])

    def select(self, rows: Tensor) -> "Split":
        """Return the images at `rows`, int64, shape (M,)."""
        images: Tensor | HostImages = (
            self.images.select(rows) if isinstance(self.images, HostImages) else self.images[rows]
        )
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, images=images, labels=labels)

    def to(self, device: torch.device) -> "Split":
        """Return the split with its tensors on `device`; host images stay on the host."""
        mean, std = (x.to(device) if isinstance(x, Tensor) else x for x in (self.mean, self.std))
        labels = None if self.labels is None else self.labels.to(device)
        return Split(self.images.to(device), labels, mean, std)


def placement(splits: Mapping[str, Split], device: torch.device, processes: int) -> str:
    """Decide where host images go: `resident` on the device where they fit, else `host`.

    On a CPU the page cache does what residence would do, and the process stays small.

    Args:
        splits: All images of a task.
        device: Where training runs.
        processes: Processes that share the device, each with images of its own.
    """
    host = [s.images for s in splits.values() if isinstance(s.images, HostImages)]
    if device.type != "cuda" or not all(images.cheap for images in host):
        return "host"
    free, _ = torch.cuda.mem_get_info(device)
    room = RESIDENT_SHARE * free / processes
    return "resident" if sum(i.shape.numel() for i in host) <= room else "host"


def place(
    splits: Mapping[str, Split], device: torch.device, processes: int = 1
) -> dict[str, Split]:
    """Return the splits ready for training on `device`, as `placement` decides."""
    placed = {name: split.to(device) for name, split in splits.items()}
    if placement(splits, device, processes) == "resident":
        for name, split in placed.items():
            if isinstance(split.images, HostImages):
                placed[name] = replace(split, images=_read_all(split.images))
    return placed


def _read_all(images: HostImages) -> Tensor:
    whole = torch.empty(
        images.shape,
        dtype=torch.uint8,
        device=images.device,
        memory_format=torch.channels_last,
    )
    for start in range(0, len(images), 1024):  # bounds the pinned memory
        part = slice(start, start + 1024)
        whole[part] = images.gather(part)
    return whole


class DataOrder:
    """Which training images each inner step sees: shuffled epochs laid end to end.

    A pure function of (seed, step): nothing but the step has to be stored to go on from it. A
    batch may straddle two epochs, so every batch is full.
    """

    def __init__(self, size: int, batch_size: int, seed: int, device: torch.device) -> None:
        self._size, self._batch_size, self._seed, self._device = size, batch_size, seed, device
        self._epochs: dict[int, Tensor] = {}

    def indices(self, inner_step: int) -> Tensor:
        """Return the image indices of one inner step, int64, shape (batch_size,)."""
        start = inner_step * self._batch_size
        parts: list[Tensor] = []
        while (missing := self._batch_size - sum(len(part) for part in parts)) > 0:
            epoch, offset = divmod(start, self._size)
            part = self._permutation(epoch)[offset : offset + missing]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch_generator(self._seed, "data-order", epoch)
            if len(self._epochs) > 1:
                self._epochs.clear()  # at most the two epochs that a batch can touch
            order = torch.randperm(self._size, generator=generator)
            self._epochs[epoch] = to_device(order, self._device)
        return self._epochs[epoch]
