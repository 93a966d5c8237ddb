"""What a GPU trains: each test runs on the CPU too where it can; `.ci/cuda` runs all on a GPU."""

import warnings

import numpy as np
import pytest
import torch

from asg_env.build import build_trainer
from asg_env.core.data import HostImages
from asg_env.env import LayerwiseLREnv
from asg_env.task_settings import ImageFolderSettings, VisDA17Settings
from asg_env.tasks.image_folder import list_images
from asg_env.validation import validate
from benchmarks import cuda

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=needs_cuda)
DEVICES = ["cpu", CUDA]

TINY = {
    "backbone": "torchvision:resnet18",
    "weights": "random",
    "image_size": 32,
    "horizon": 2,
    "inner_steps": 3,
    "batch_size": 8,
}


@pytest.fixture
def settings(visda_root):
    def make(**changes):
        return validate(VisDA17Settings, {"root": str(visda_root), **TINY, **changes}, "env")

    return make


def weights(trainer):
    return torch.cat([p.detach().flatten().cpu() for p in trainer.optimizee.parameters()])


@pytest.fixture
def moves(settings):
    """Return a function that trains two windows and gives how far each weight moved."""

    def train(data_seed=2, **changes):
        trainer = build_trainer("ASG/VisDA17-v0", settings(**changes))
        trainer.reset(1, data_seed)
        start = weights(trainer)
        for window in (3, 3):
            assert not trainer.run(window, [0.1] * len(trainer.layer_groups)).diverged
        return weights(trainer) - start

    return train


def apart(ours, theirs):
    """Difference of two trainings, as a share of how far the second one moved the weights."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", ["none", "flip-crop"])
def test_deterministic_kernels_repeat_bit_for_bit(moves, device, augmentation):
    changes = {"device": device, "augmentation": augmentation, "deterministic": True}
    assert torch.equal(moves(**changes), moves(**changes))


FLOAT32_BOUND = 0.05
# On a CPU the training in bfloat16 is 0.13 apart from the one in float32, with flip-crop 0.14; this
# is less than twice that. Another order of the images is 0.65 apart.
BFLOAT16_BOUND = 0.25


@pytest.mark.parametrize(
    ("device", "changes", "bound"),
    [
        ("cpu", {"precision": "bfloat16"}, BFLOAT16_BOUND),
        pytest.param("cuda", {}, FLOAT32_BOUND, marks=needs_cuda),
        pytest.param("cuda", {"augmentation": "flip-crop"}, FLOAT32_BOUND, marks=needs_cuda),
        pytest.param("cuda", {"precision": "bfloat16"}, BFLOAT16_BOUND, marks=needs_cuda),
    ],
)
def test_all_train_what_the_cpu_trains_in_float32(moves, device, changes, bound):
    plain = moves(**{**changes, "device": "cpu", "precision": "float32"})

    assert apart(moves(**changes, device=device), plain) < bound


def test_another_order_of_images_is_further_apart_than_any_bound(moves):
    assert apart(moves(data_seed=3), moves()) > 2 * BFLOAT16_BOUND


@needs_cuda
def test_compiled_network_trains_the_same(moves):
    assert apart(moves(device="cuda", compile=True), moves(device="cuda")) < FLOAT32_BOUND


@pytest.mark.parametrize("device", DEVICES)
def test_resident_and_host_images_train_the_same(make_store, image_folders, monkeypatch, device):
    store = make_store(list_images(*image_folders, target_labels=True))
    chosen = {**TINY, "store": str(store), "deterministic": True, "device": device}
    found = []
    for place in ("resident", "host"):
        monkeypatch.setattr("asg_env.core.data.placement", lambda *_, place=place: place)
        trainer = build_trainer("ASG/ImageFolder-v0", validate(ImageFolderSettings, chosen, "env"))
        assert isinstance(trainer.splits["train"].images, HostImages) == (place == "host")
        trainer.reset(1, 2)
        trainer.run(4, [0.1] * len(trainer.layer_groups))
        found.append(weights(trainer))
    assert torch.equal(*found)


@needs_cuda
def test_images_of_a_small_store_become_resident(make_store, image_folders):
    store = make_store(list_images(*image_folders, target_labels=True))
    chosen = {**TINY, "store": str(store), "device": "cuda"}
    trainer = build_trainer("ASG/ImageFolder-v0", validate(ImageFolderSettings, chosen, "env"))
    images = trainer.splits["train"].images
    assert isinstance(images, torch.Tensor)
    assert images.device.type == "cuda"


def plan_on(device):
    return cuda.Plan(torch.device(device), "torchvision:resnet18", 64, "bfloat16", 32, 5, 1)


@needs_cuda
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("augmentation", ["none", "flip-crop"])
def test_the_host_waits_once_a_window(on_host, augmentation):
    plan = plan_on("cuda")
    pretrained = cuda.load_pretrained(plan.backbone, "random", plan.image_size)
    images = cuda.random_images(plan, pretrained, on_host)
    assert cuda.host_waits(plan, pretrained, images, augmentation) == 1


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("augmentation", ["none", "flip-crop"])
def test_waits_are_counted_and_not_the_warning_of_the_mode(monkeypatch, on_host, augmentation):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype; synchronizing", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(cuda, "IMAGES", 12)
    plan = cuda.Plan(torch.device("cpu"), "torchvision:resnet18", 32, "float32", 4, 2, 1)
    pretrained = cuda.load_pretrained(plan.backbone, "random", plan.image_size)
    images = cuda.random_images(plan, pretrained, on_host)
    assert isinstance(images.images, HostImages) == on_host

    original = cuda.Trainer.run

    def run(trainer, *arguments):
        assert (trainer.settings.augmentation, trainer.splits["train"].images.shape[0]) == (
            augmentation,
            12,
        )
        if modes:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return original(trainer, *arguments)

    monkeypatch.setattr(cuda.Trainer, "run", run)

    assert cuda.host_waits(plan, pretrained, images, augmentation) == 3
    assert modes == ["warn", "default"]


@pytest.mark.parametrize("device", DEVICES)
def test_an_episode_runs(settings, device):
    env = LayerwiseLREnv("ASG/VisDA17-v0", settings(precision="bfloat16", device=device))
    observation, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, reward, terminated, _, _ = env.step(np.ones(7, dtype=np.int64))
        assert np.isfinite(observation).all()
        assert np.isfinite(reward)
