import random

import pytest
import torch

from asg_env.core import trainer as trainer_module
from asg_env.core.augmentation import Augmentation

SIZE = (12, 10)  # height and width differ, so that a swap shows


@pytest.fixture(params=["flip-crop", "randaugment"])
def augment(request):
    return Augmentation(request.param, SIZE)


def noise(batch, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, *SIZE), generator=generator, dtype=torch.uint8)


def test_augmentation_follows_its_seed(augment):
    images = noise(6)
    first = augment(images, 3)

    torch.rand(5)  # the global generator plays no part
    assert torch.equal(augment(images, 3), first)
    assert not torch.equal(augment(images, 4), first)


def test_augmentation_draws_for_each_image(augment):
    images = noise(1).expand(8, -1, -1, -1)

    assert len({image.numpy().tobytes() for image in augment(images, 0)}) > 2


def test_augmentation_changes_images_and_leaves_its_argument(augment):
    images = noise(8)
    before = images.clone()

    changed = [not torch.equal(*pair) for pair in zip(augment(images, 0), images, strict=True)]

    assert any(changed)
    assert torch.equal(images, before)


def test_augmentation_leaves_the_global_generators_as_they_were(augment):
    torch_state, python_state = torch.get_rng_state(), random.getstate()

    augment(noise(4), 7)

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_shape_and_bytes(augment, channels):
    images = noise(5, channels)
    for seed in range(12):  # randaugment has fourteen operations
        augmented = augment(images, seed)
        assert augmented.shape == images.shape
        assert augmented.dtype == torch.uint8


def test_flip_crop_flips_half_of_the_images_and_keeps_constant_ones():
    augment = Augmentation("flip-crop", SIZE)
    ramp = torch.arange(10, dtype=torch.uint8).mul(25).expand(400, 1, *SIZE)

    augmented = augment(ramp, 0).float()

    flipped = augmented[..., 0].mean((1, 2)) > augmented[..., -1].mean((1, 2))
    assert 0.4 < flipped.float().mean() < 0.6  # four standard deviations of a fair coin
    even = torch.full((3, 3, *SIZE), 77, dtype=torch.uint8)
    assert torch.equal(augment(even, 0), even)


def test_trainer_without_augmentation_builds_none(make_trainer, monkeypatch):
    def refuse(*_):
        raise AssertionError("an augmentation was built")

    monkeypatch.setattr(trainer_module, "Augmentation", refuse)

    make_trainer(augmentation="none").run(1, (1.0, 1.0, 1.0))
    with pytest.raises(AssertionError, match="was built"):
        make_trainer(augmentation="flip-crop")
