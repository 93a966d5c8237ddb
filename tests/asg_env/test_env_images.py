"""The environment on one's own images, at miniature settings."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_checker import data_equivalence as equal

from asg_env.build import build_trainer
from asg_env.env import LayerwiseLREnv
from asg_env.task_settings import settings_class
from asg_env.tasks.listing import DataError
from asg_env.validation import ConfigError, validate

VISDA, FOLDERS = "ASG/VisDA17-v0", "ASG/ImageFolder-v0"
TINY = {
    **{"backbone": "torchvision:shufflenet_v2_x0_5", "weights": "random", "image_size": 32},
    **{"horizon": 2, "inner_steps": 2, "batch_size": 4},
}
# With these the network learns, so that figures change from one env step to the next.
LEARNING = {
    **{"backbone": "torchvision:resnet18", "base_lr": 0.01, "start_multiplier": 1.0},
    **{"horizon": 3, "inner_steps": 2, "batch_size": 8},
}


@pytest.fixture
def settings_of(visda_root, image_folders):
    """Return a function that makes the settings of a task on its miniature images."""
    source, target = map(str, image_folders)
    images = {VISDA: {"root": str(visda_root)}, FOLDERS: {"source": source, "target": target}}

    return lambda task, **settings: TINY | images[task] | settings


@pytest.fixture
def make(settings_of):
    """Return a function that makes a bare environment."""

    def make_env(task, **settings):
        return gym.make(task, **settings_of(task, **settings)).unwrapped

    return make_env


@pytest.fixture
def trainer_of(settings_of):
    """Return a function that builds the trainer of a task."""

    def build(task, **settings):
        values = settings_of(task, **settings)
        return build_trainer(task, validate(settings_class(task), values, "env"))

    return build


def rollout(env, action=2, **reset):
    transitions = [env.reset(**reset)]
    while len(transitions) == 1 or not transitions[-1][2]:
        transitions.append(env.step([action] * len(env.trainer.layer_groups)))
    return transitions


def infos_of(transitions):
    return [transition[-1] for transition in transitions]


# Contract


@pytest.mark.parametrize("task", [VISDA, FOLDERS])
def test_env_passes_the_checker_without_warning(make, task):
    env = make(task, outer_valid_size=12, outer_valid_fraction=0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def test_episodes_repeat_from_the_same_seed_and_not_from_another(make):
    env = make(FOLDERS, augmentation="flip-crop")

    first, again, other = (rollout(env, seed=seed) for seed in (3, 3, 4))

    assert equal(first, again, exact=True)
    assert not equal(first, other, exact=True)


def test_env_with_resnet_sees_its_layer_groups(make, image_folders):
    env = make(FOLDERS, backbone="torchvision:resnet18")

    observation, info = env.reset(seed=0)

    groups = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head")
    assert info["layer_groups"] == groups
    assert env.action_space.shape == (7,)
    assert len(observation) == len(env.observation_labels)


def test_env_says_how_many_processes_share_its_device(settings_of, monkeypatch):
    asked = []
    monkeypatch.setattr("asg_env.core.data.placement", lambda *given: asked.append(given) or "host")
    settings = validate(settings_class(FOLDERS), settings_of(FOLDERS), "env")

    LayerwiseLREnv(FOLDERS, settings, processes=3)

    ((splits, device, processes),) = asked
    assert ("train" in splits, device, processes) == (True, torch.device("cpu"), 3)


# What the reward reads


@pytest.mark.parametrize("metric", ["accuracy", "mean_recall"])
def test_gain_is_the_change_of_the_metric_on_outer_valid(make, metric):
    # Thirteen images, so that classes are unequal and the two figures differ.
    env = make(FOLDERS, **LEARNING, metric=metric, outer_valid_size=13, outer_valid_fraction=0.8)
    other = {"accuracy": "mean_recall", "mean_recall": "accuracy"}[metric]

    transitions = rollout(env, seed=1)

    infos, rewards = infos_of(transitions), [t[1] for t in transitions[1:]]
    gains = np.diff([info[f"{metric}/outer_valid"] for info in infos])
    np.testing.assert_allclose(rewards, gains, atol=1e-9)
    assert np.abs(gains).max() > 0
    assert not np.allclose(rewards, np.diff([info[f"{other}/outer_valid"] for info in infos]))
    assert [info["reward/gain"] for info in infos[1:]] == rewards


def test_visda_is_rewarded_for_mean_recall_unless_told_otherwise(make):
    env = make(VISDA, **LEARNING, outer_valid_size=13, outer_valid_fraction=0.5)

    transitions = rollout(env, seed=0)

    recalls = [info["mean_recall/outer_valid"] for info in infos_of(transitions)]
    np.testing.assert_allclose([t[1] for t in transitions[1:]], np.diff(recalls), atol=1e-9)
    assert len(set(recalls)) > 1


@pytest.mark.parametrize("task", [VISDA, FOLDERS])
@pytest.mark.parametrize("reward", ["gain", "level", "terminal", "loss"])
def test_reward_of_real_labels_is_refused_where_none_are_held_out(trainer_of, task, reward):
    message = (
        rf"^`reward` must not need labelled images of outer_valid, which {task} does not have with "
        rf"these settings, got {{'{reward}': 1.0}}; set env.reward to train_loss$"
    )
    with pytest.raises(ConfigError, match=message):
        trainer_of(task, outer_valid_fraction=0.0, reward=reward)


def test_reward_of_real_labels_is_refused_where_there_are_none(trainer_of):
    with pytest.raises(ConfigError, match=r"must not need labelled images of outer_valid, which"):
        trainer_of(FOLDERS, target_labels=False)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"reward": "retention", "outer_valid_fraction": 0.0}, "images of old_task"),
        ({"reward": "inner_valid_gain", "inner_valid_fraction": 0.0}, "labelled .* inner_valid"),
        ({"observation": "extended", "inner_valid_fraction": 0.0}, "labelled .* inner_valid"),
    ],
)
def test_split_that_nothing_was_held_out_for_is_refused(trainer_of, settings, missing):
    with pytest.raises(ConfigError, match=rf"must not need {missing}, which ASG/ImageFolder-v0 do"):
        trainer_of(FOLDERS, **settings)


@pytest.mark.parametrize("reward", ["train_loss", "inner_valid_gain"])
def test_reward_without_real_labels_is_accepted_where_none_are_held_out(make, reward):
    learning = LEARNING if reward == "inner_valid_gain" else {}
    settings = {"outer_valid_fraction": 0.0, "inner_valid_fraction": 0.5, "reward": reward}
    env = make(FOLDERS, **learning, **settings)

    transitions = rollout(env, seed=0)

    assert "outer_valid" not in env.trainer.splits
    assert env.trainer.retention() is None
    for info in infos_of(transitions):
        assert not [key for key in info if key.endswith("outer_valid")]
        assert f"reward/{reward}" in info
    if reward == "train_loss":
        assert env.images_per_measurement == 0
    assert any(transition[1] != 0 for transition in transitions[1:])


def test_target_without_labels_can_be_rewarded_for_retention(make):
    env = make(FOLDERS, target_labels=False, reward="retention", base_lr=1.0, start_multiplier=1.0)

    transitions = rollout(env, seed=0)

    assert env.trainer.splits["outer_valid"].labels is None
    assert not [key for key in transitions[-1][-1] if key.endswith("outer_valid")]
    total = sum(transition[1] for transition in transitions[1:])
    assert 1 + total == pytest.approx(env.trainer.retention())


# Settings that do not fit


def test_more_outer_valid_images_than_there_are_is_refused(trainer_of):
    with pytest.raises(
        ConfigError, match=r"`outer_valid_size` must be <= 4 for ASG/ImageFolder-v0, got 5; lower"
    ):
        trainer_of(FOLDERS, outer_valid_size=5)
    assert len(trainer_of(FOLDERS, outer_valid_size=4).splits["outer_valid"]) == 4
    assert len(trainer_of(FOLDERS).splits["outer_valid"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "/gone", "target": "/gone"}, r"^/gone is no folder; give one that holds a"),
        ({"store": "/gone"}, r"^/gone is no folder; make the image store with `asg prepare`$"),
        ({"backbone": "torchvision:resnet19"}, r"^`torchvision:resnet19` is unknown; did you mea"),
        ({"backbone": "resnet18"}, r"^a backbone must be named torchvision:NAME or timm:NAME, got"),
        ({"weights": "best"}, r"^the weights of `torchvision:shufflenet_v2_x0_5` must be random,"),
        ({"layer_groups": {"head": r"head\."}}, r"^`layer_groups` must fit the network: trainable"),
    ],
)
def test_mistakes_are_said_in_one_sentence(trainer_of, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        trainer_of(FOLDERS, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("task", [VISDA, FOLDERS])
def test_device_that_is_not_there_is_refused_in_one_sentence(trainer_of, task):
    message = r"^`device` must be a torch device of this machine, got 'cuda' \([^\n]+\); use cpu$"
    with pytest.raises(ConfigError, match=message):
        trainer_of(task, device="cuda")


def test_unreadable_image_ends_the_episode_with_its_path(make, image_folders, tmp_path):
    source = tmp_path / "source"
    for folder in image_folders[0].iterdir():
        (source / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            (source / folder.name / file.name).write_text("this is a text file", encoding="utf-8")
    env = make(FOLDERS, source=str(source))  # no image is opened before it is needed

    with pytest.raises(DataError, match=rf"^{source}/\w+/\d+\.png is no readable image \(unknown"):
        env.reset(seed=0)
