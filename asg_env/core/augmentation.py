"""Random transforms of a batch of training images, drawn per image from a named seed."""

from typing import Literal

import torch
from torch import Tensor

AugmentationName = Literal["none", "flip-crop", "randaugment"]


class Augmentation:
    """torchvision's transforms on the device that holds the images, one draw for each image.

    `flip-crop`: random resized crop, then a horizontal flip in half of the cases. `randaugment`:
    the flip, then RandAugment, two operations at magnitude 9 of 30. All at torchvision's default
    ranges. They draw from the global generator, which is left as it was found.
    """

    def __init__(self, name: Literal["flip-crop", "randaugment"], size: tuple[int, int]) -> None:
        """Build the transform for images of `size`, height and width in pixels."""
        from torchvision.transforms import v2  # imported when asked for: it takes a second

        flip = v2.RandomHorizontalFlip()
        self._transform = (
            v2.Compose([v2.RandomResizedCrop(size, antialias=True), flip])
            if name == "flip-crop"
            else v2.Compose([flip, v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)])
        )

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Return transformed images.

        Args:
            pixels: uint8, shape (B, C, H, W).
            seed: Of the batch's draws.

        Returns:
            uint8, same shape and device.
        """
        # The transforms draw on the CPU, whatever device the images are on, so seeding and
        # restoring that one generator is enough; `torch.manual_seed` would move CUDA's as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.stack([self._transform(image) for image in pixels])
