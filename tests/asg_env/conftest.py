"""A synthetic optimizee for the core, and the digits environment at tiny settings."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from torch import nn

from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.data import Split
from asg_env.core.optimizee import Optimizee
from asg_env.core.trainer import Trainer, TrainerSettings
from asg_env.schedule import LearnedSchedule

DIGITS = "ASG/Digits-v0"
TINY = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50}
STAY = [1] * 5  # every rate stays as it is
PATTERNS = {"conv": r"backbone\.0\.", "norm": r"backbone\.1\.", "head": r"head\."}


@pytest.fixture
def build_optimizee():
    """Return a function that makes the same small convolutional optimizee every time."""

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            norm = nn.BatchNorm2d(4)
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
            backbone = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm, nn.ReLU(), nn.Flatten())
            head = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
            old_head = nn.Linear(16, 2)
            old_head.weight.data *= 4  # so that the old predictions react to the backbone
        return Optimizee(backbone, head, old_head)

    return build


@pytest.fixture(scope="session")
def tiny_splits():
    """Noisy 4x4 patterns: 20 images to train on, three new classes, two old ones."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 200, (3, 1, 4, 4))

    def split(size, classes):
        labels = np.arange(size) % classes
        images = patterns[labels] + generator.integers(0, 56, (size, 1, 4, 4))
        images = torch.from_numpy(images.astype(np.uint8))
        return Split(images, torch.from_numpy(labels), 128.0, 64.0)

    return {
        "train": split(20, 3),
        "inner_valid": split(12, 3),
        "outer_valid": split(12, 3),
        "test": split(12, 3),
        "old_task": split(10, 2),
    }


@pytest.fixture
def make_trainer(build_optimizee, tiny_splits):
    """Return a function that puts a trainer around the synthetic optimizee."""

    def make(guidance=None, splits=None, **settings):
        settings = {"base_lr": 0.1, "total_steps": 20, "batch_size": 8} | settings
        return Trainer(
            build_optimizee(),
            PATTERNS,
            tiny_splits if splits is None else splits,
            TrainerSettings(**settings),
            {"kl": 0.1} if guidance is None else guidance,
            torch.device("cpu"),
        )

    return make


@pytest.fixture(scope="session")
def session_digits_trainer():
    settings = EnvSettings(horizon=3, inner_steps=2, outer_valid_size=50)
    return build_trainer(DIGITS, settings)


@pytest.fixture
def digits_trainer(session_digits_trainer):
    """The digits trainer at inner step 0, shared by all tests."""
    session_digits_trainer.reset(head_seed=0, data_seed=0)
    return session_digits_trainer


@pytest.fixture
def make_env():
    """Return a function that makes a bare digits environment at tiny settings."""

    def make(**settings):
        return gym.make(DIGITS, **(TINY | settings)).unwrapped

    return make


@pytest.fixture(scope="session")
def rollout():
    """Return a function that gives all transitions of an episode, the reset first."""

    def transitions(env, actions=None, **reset):
        found = [env.reset(**reset)]
        actions = iter(actions or itertools.repeat(STAY))
        while len(found) == 1 or not found[-1][2]:
            found.append(env.step(next(actions)))
        return found

    return transitions


@pytest.fixture(scope="session")
def weights():
    """Return a function that copies all tensors of a trainer's optimizee."""

    def copied(trainer):
        return {k: v.clone() for k, v in trainer.optimizee.state_dict().items()}

    return copied


@pytest.fixture(scope="session")
def identical():
    """Return a function that compares nested data bit for bit, tensors included."""

    def plain(data):
        if isinstance(data, torch.Tensor):
            return data.numpy()
        if isinstance(data, dict):
            return {key: plain(value) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return type(data)(plain(value) for value in data)
        return data

    def same(left, right):
        return data_equivalence(plain(left), plain(right), exact=True)

    return same


@pytest.fixture
def make_schedule():
    """Return a function that makes a schedule of two groups and three knots for `make_network`."""

    def make(**changes):
        values = {
            "layer_groups": {"body": r"0\.", "head": r"2\."},
            "knots": (0.0, 0.25, 0.5),
            "multipliers": ((1.0, 0.1), (0.5, 0.2), (0.0, 0.4)),
            "spread": ((0.0, 0.1),) * 3,
            "base_lr": 0.3,
            "optimizer": "sgd",
            "momentum_form": "pytorch",
            "lr_factor": "constant",
            "episodes": 16,
            "task": DIGITS,
            "instances": "unknown-scale",
            "base_lr_scale": 1.0,
            "inner_steps": 3,
            "settings": {"horizon": 3, "reward": {"gain": 1.0}},
            "provenance": {"config_digest": "abc"},
        }
        return LearnedSchedule(**{**values, **changes})

    return make


@pytest.fixture
def make_network():
    """Return a function that makes the same two layers every time."""

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    return make
