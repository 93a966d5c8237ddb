"""What can only be checked on a GPU; `.ci/cuda` runs it there, elsewhere it is skipped."""

import numpy as np
import pytest
import torch

from asg_env.config import validate
from asg_env.core.data import HostImages
from asg_env.env import LayerwiseLREnv, build_trainer
from asg_env.task_settings import ImageFolderSettings, VisDA17Settings
from asg_env.tasks.image_folder import list_images
from benchmarks import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TINY = {
    "backbone": "torchvision:resnet18",
    "weights": "random",
    "image_size": 32,
    "horizon": 2,
    "inner_steps": 3,
    "batch_size": 8,
    "outer_valid_size": 24,
    "device": "cuda",
}
DEVICE = torch.device("cuda")


@pytest.fixture
def settings(visda_root):
    def make(**changes):
        return validate(VisDA17Settings, {"root": str(visda_root), **TINY, **changes}, "env")

    return make


@pytest.fixture
def weights_after(settings):
    """Return a function that trains two windows on CUDA and gives the weights."""

    def train(**changes):
        trainer = build_trainer("ASG/VisDA17-v0", settings(**changes))
        trainer.reset(1, 2)
        for window in (3, 3):
            assert not trainer.run(window, [0.1] * len(trainer.layer_groups)).diverged
        return torch.cat([p.detach().flatten().cpu() for p in trainer.optimizee.parameters()])

    return train


def test_deterministic_kernels_repeat_bit_for_bit(weights_after):
    assert torch.equal(weights_after(deterministic=True), weights_after(deterministic=True))


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16"}, {"augmentation": "flip-crop"}])
def test_cuda_trains_what_the_cpu_trains(weights_after, changes):
    on_cuda, on_cpu = weights_after(**changes), weights_after(**changes, device="cpu")
    change = (on_cuda - on_cpu).norm() / on_cpu.norm()
    assert change < (1e-3 if "precision" not in changes else 1e-2)


def test_compiled_network_trains_the_same(weights_after):
    plain, compiled = weights_after(), weights_after(compile=True)
    assert (plain - compiled).norm() / plain.norm() < 1e-3


def test_resident_and_host_images_train_the_same(make_store, image_folders, monkeypatch):
    store = make_store(list_images(*image_folders, target_labels=True))
    found = []
    for share in (0.5, 0.0):  # all of the free memory's half, or none of it
        monkeypatch.setattr("asg_env.core.data.RESIDENT_SHARE", share)
        chosen = {**TINY, "store": str(store), "deterministic": True}
        trainer = build_trainer("ASG/ImageFolder-v0", validate(ImageFolderSettings, chosen, "env"))
        assert isinstance(trainer.splits["train"].images, HostImages) == (share == 0.0)
        trainer.reset(1, 2)
        trainer.run(4, [0.1] * len(trainer.layer_groups))
        found.append(torch.cat([p.detach().flatten() for p in trainer.optimizee.parameters()]))
    assert torch.equal(*found)


def test_the_host_waits_once_a_window():
    plan = cuda.Plan(DEVICE, "torchvision:resnet18", 64, "bfloat16", 32, 5, 1)
    pretrained = cuda.load_pretrained(plan.backbone, "random", plan.image_size)
    assert cuda.host_waits(plan, pretrained, cuda.random_images(plan, pretrained)) == 1


def test_an_episode_runs_on_cuda(settings):
    env = LayerwiseLREnv("ASG/VisDA17-v0", settings(precision="bfloat16"))
    observation, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, reward, terminated, _, _ = env.step(np.ones(7, dtype=np.int64))
        assert np.isfinite(observation).all()
        assert np.isfinite(reward)
