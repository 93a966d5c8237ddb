"""Labelled images on the training device, and the order in which they are visited."""

from dataclasses import dataclass

import torch
from torch import Tensor

from asg_env.core.seeding import torch_generator


@dataclass(frozen=True)
class Split:
    """One split, resident on its device as bytes and normalised batch by batch.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        mean: Pixel mean that is subtracted, in pixel units (0 to 255).
        std: Pixel standard deviation that is divided by, in pixel units.
    """

    images: Tensor
    labels: Tensor
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> Tensor:
        """Return the images at `index` as float32, normalised, shape (B, C, H, W)."""
        return self.images[index].float().sub_(self.mean).div_(self.std)

    def head(self, size: int) -> "Split":
        """Return the first `size` images after interleaving classes, so that it is balanced."""
        rank = torch.zeros_like(self.labels)
        for label in self.labels.unique():
            mask = self.labels == label
            rank[mask] = torch.arange(int(mask.sum()), device=rank.device)
        order = torch.argsort(rank * (int(self.labels.max()) + 1) + self.labels)[:size]
        return Split(self.images[order], self.labels[order], self.mean, self.std)

    def to(self, device: torch.device) -> "Split":
        """Return the split with its tensors on `device`."""
        return Split(self.images.to(device), self.labels.to(device), self.mean, self.std)


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
            self._epochs[epoch] = torch.randperm(self._size, generator=generator).to(self._device)
        return self._epochs[epoch]
