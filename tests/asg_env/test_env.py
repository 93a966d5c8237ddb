"""What the environment shows and takes: both checkers, infos, actions, rates, instances."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from asg_env.core.optimizers import lr_factor
from asg_env.env import make_env as entry_point
from asg_env.instances import Instance, published_test_instances
from asg_env.rewards import REWARD_TERMS
from asg_env.validation import ConfigError

DIGITS = "ASG/Digits-v0"
ACTIONS = ("grid", "relative", "box")
OBSERVATIONS = ("asg", "scaled", "extended", "normalised")
GROUPS = ("conv1", "conv2", "conv3", "conv4", "head")
STAY = [1] * 5
EVERY_TERM = dict.fromkeys(REWARD_TERMS, 1.0)
INFO_KEYS = {
    "layer_groups",
    "lr_multipliers",
    "effective_lrs",
    "inner_step",
    "loss/ce",
    "loss/kl",
    "diverged",
    "cause",
}
INSTANCE = {"task": DIGITS, "head_seed": 3, "data_seed": 4, "base_lr_scale": 1.0}


# Contract


@pytest.mark.parametrize("instances", ["fixed", "unknown-scale"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action", ACTIONS)
def test_env_passes_both_checkers_without_warning(make_env, action, observation, instances):
    sb3_checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = make_env(
        action=action, observation=observation, instances=instances, horizon=2, inner_steps=1
    )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env)
        sb3_checker.check_env(env)


@pytest.mark.parametrize("render_mode", ["ansi", "rgb_array"])
def test_env_passes_both_checkers_when_rendered(make_env, render_mode):
    sb3_checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = make_env(render_mode=render_mode, horizon=2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env)
        sb3_checker.check_env(env, skip_render_check=False)


def test_make_wraps_the_env_in_the_passive_checker_without_warning(rollout):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(DIGITS, horizon=2, inner_steps=2, outer_valid_size=50)
        transitions = rollout(env, seed=0)

    assert len(transitions) == 1 + 2  # the reset and two env steps


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action", ACTIONS)
def test_observations_are_labelled_and_in_bounds(make_env, action, observation):
    env = make_env(action=action, observation=observation)
    env.action_space.seed(0)
    labels = env.observation_labels

    assert len(labels) == len(set(labels)) == env.observation_space.shape[0]
    observations = [env.reset(seed=0)[0]]
    observations += [env.step(env.action_space.sample())[0] for _ in range(3)]
    for step, values in enumerate(observations):
        assert values.dtype == np.float32
        assert env.observation_space.contains(values)
        assert values[labels.index("progress")] == pytest.approx(step / 3)


@pytest.mark.parametrize("action", ACTIONS)
def test_observation_shows_the_multipliers_used_in_the_order_of_the_groups(make_env, action):
    env = make_env(action=action, observation="asg")
    env.reset(seed=0)
    multipliers = (0.0, 0.003, 0.01, 0.1, 1.0)

    observation, *_, info = env.step_multipliers(multipliers)

    assert env.observation_labels[-5:] == tuple(f"multiplier/{group}" for group in GROUPS)
    assert observation[-5:].tolist() == pytest.approx(multipliers)
    assert info["lr_multipliers"].tolist() == list(multipliers)
    assert env.multipliers == multipliers


def test_relative_actions_move_from_where_each_group_stands(make_env):
    env = make_env(start_multiplier=0.03)
    env.reset(seed=0)

    env.step([0, 1, 2, 2, 2])
    info = env.step([0, 1, 2, 1, 0])[-1]

    assert info["lr_multipliers"].tolist() == [0.003, 0.03, 0.3, 0.1, 0.03]


def test_reset_takes_no_inner_step(make_env):
    env = make_env(start_multiplier=0.1, observation="asg")

    observation, info = env.reset(seed=0)

    assert info["inner_step"] == env.trainer.inner_step == 0
    assert observation[env.observation_labels.index("progress")] == 0.0
    assert observation[env.observation_labels.index("kl")] == pytest.approx(0.0, abs=1e-5)
    assert info["lr_multipliers"].tolist() == [0.1] * 5


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_info_has_every_key_at_reset_and_at_every_step(make_env, observation, rollout):
    env = make_env(observation=observation, reward=EVERY_TERM)
    scores = {"accuracy/outer_valid", "mean_recall/outer_valid"}
    expected = INFO_KEYS | scores | {f"reward/{name}" for name in EVERY_TERM}

    infos = [transition[-1] for transition in rollout(env, seed=0)]

    assert len(infos) == 4
    for step, info in enumerate(infos):
        assert set(info) == expected
        assert info["layer_groups"] == GROUPS
        assert info["inner_step"] == 2 * step
        assert (info["diverged"], info["cause"]) == (False, "")
        assert info["lr_multipliers"].shape == info["effective_lrs"].shape == (5,)
        numbers = [value for key, value in info.items() if key not in ("layer_groups", "cause")]
        assert all(np.isfinite(value).all() for value in numbers)
        assert 0 <= info["accuracy/outer_valid"] <= 1
    assert all(infos[0][f"reward/{name}"] == 0.0 for name in EVERY_TERM)


def test_step_terminates_at_the_horizon_and_never_truncates(make_env, rollout):
    transitions = rollout(make_env(horizon=2), seed=0)

    assert [t[2] for t in transitions[1:]] == [False, True]
    assert [t[3] for t in transitions[1:]] == [False, False]


def test_growing_windows_run_to_the_end_of_the_last_epoch(make_env, rollout):
    env = make_env(inner_steps="asg-as-coded", steps_per_epoch=12, epochs=2, horizon=None)

    infos = [transition[-1] for transition in rollout(env, seed=0)]

    assert env.horizon == 4
    assert [info["inner_step"] for info in infos] == [0, 10, 12, 22, 24]


def test_step_needs_a_reset_before_and_after_the_episode(make_env, rollout):
    env = make_env(horizon=1)
    for call in (lambda: env.step(STAY), lambda: env.step_multipliers([0.1] * 5)):
        with pytest.raises(ResetNeeded, match="call env.reset"):
            call()
    rollout(env, seed=0)
    for call in (lambda: env.step(STAY), lambda: env.step_multipliers([0.1] * 5)):
        with pytest.raises(ResetNeeded, match="call env.reset"):
            call()
    env.reset()
    env.step(STAY)


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("relative", [1] * 4),
        ("relative", [3] * 5),
        ("relative", [-1] * 5),
        ("relative", [1.7] * 5),
        ("relative", [float("nan")] * 5),
        ("relative", 1),
        ("relative", None),
        ("grid", [7] * 5),
        ("box", [1.5] * 5),
        ("box", [float("nan")] * 5),
        ("box", [0.0] * 6),
    ],
)
def test_step_refuses_an_action_outside_the_space_and_changes_nothing(make_env, kind, action):
    env = make_env(action=kind)
    env.reset(seed=0)
    before = env.multipliers

    with pytest.raises(ValueError, match="action must lie in"):
        env.step(action)

    assert env.multipliers == before
    assert env.trainer.inner_step == 0


@pytest.mark.parametrize("action", [STAY, tuple(STAY), np.array(STAY, np.int32)])
def test_step_accepts_plain_sequences_and_narrow_integers(make_env, action):
    env = make_env()
    env.reset(seed=0)

    assert env.step(action)[-1]["lr_multipliers"].tolist() == [0.01] * 5


def test_step_accepts_double_precision_where_the_box_is_single(make_env):
    env = make_env(action="box")
    env.reset(seed=0)

    assert env.step(np.ones(5))[-1]["lr_multipliers"].tolist() == [1.0] * 5


@pytest.mark.parametrize("multipliers", [[0.1] * 4, [0.1] * 4 + [-1.0], [float("nan")] * 5])
def test_step_multipliers_refuses_and_changes_nothing(make_env, identical, multipliers):
    refused, untouched = make_env(), make_env()
    for env in (refused, untouched):
        env.reset(seed=0)
        env.step(STAY)

    with pytest.raises(ValueError, match="multipliers"):
        refused.step_multipliers(multipliers)

    assert identical(refused.step(STAY), untouched.step(STAY))


# Rates: nominal in public, applied in secret


@pytest.mark.parametrize("factor", ["constant", "warmup-poly"])
def test_effective_lrs_are_nominal(make_env, factor, rollout):
    env = make_env(base_lr=0.2, lr_factor=factor, start_multiplier=0.1)
    scaled = INSTANCE | {"base_lr_scale": 7.0}

    transitions = rollout(env, options={"instance": scaled})

    last_inner_steps = [0, 1, 3, 5]
    for (*_, info), step in zip(transitions, last_inner_steps, strict=True):
        expected = 0.2 * 0.1 * lr_factor(factor, step, 6)
        np.testing.assert_allclose(info["effective_lrs"], [expected] * 5)


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_hidden_scale_shows_in_no_observation_nor_info_at_reset(make_env, identical, observation):
    env = make_env(observation=observation, instances="unknown-scale", reward=EVERY_TERM)

    small, large = (
        env.reset(options={"instance": INSTANCE | {"base_lr_scale": scale}})
        for scale in (0.1, 10.0)
    )

    assert identical(small, large)


def test_hidden_scale_acts_on_the_weights(make_env, weights):
    env, ends = make_env(), []
    for scale in (0.1, 10.0):
        env.reset(options={"instance": INSTANCE | {"base_lr_scale": scale}})
        info = env.step(STAY)[-1]
        ends.append((weights(env.trainer)["head.weight"], info["effective_lrs"]))

    assert not torch.equal(ends[0][0], ends[1][0])
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


# Instances


def test_reset_draws_train_instances_by_default(make_env):
    env = make_env(instances="unknown-scale")
    drawn = []
    for seed in (0, 1, None):
        env.reset(seed=seed)
        drawn.append(env.instance)

    assert len(set(drawn)) == 3
    assert all(one.head_seed < 2**31 for one in drawn)
    assert all(one.task == DIGITS for one in drawn)


@pytest.mark.parametrize("instances", ["fixed", "unknown-scale"])
def test_reset_draws_published_instances_of_the_test_split(make_env, instances):
    env = make_env(instances=instances, split="test")
    published = published_test_instances(DIGITS, instances)
    env.reset(seed=0)
    drawn = {env.instance}
    for _ in range(3):
        env.reset()
        drawn.add(env.instance)

    assert len(drawn) > 1
    assert drawn <= set(published)


@pytest.mark.parametrize("as_dict", [True, False])
def test_reset_pins_the_instance_of_the_options(make_env, identical, as_dict):
    env, instance = make_env(), Instance(**INSTANCE)
    options = {"instance": instance.to_dict() if as_dict else instance}
    pinned = [env.reset(seed=seed, options=options) for seed in (0, 1)]

    assert env.instance == instance
    assert identical(pinned[0], pinned[1])
    assert set(options) == {"instance"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instances": "fixed"}, r"reset options must be among 'instance', got \['instances'\]"),
        ({"instance": INSTANCE | {"task": "ASG/Other-v0"}}, r"`task` must be ASG/Digits-v0, got"),
        ({"instance": {"task": DIGITS}}, r"an instance has the keys"),
        ({"instance": INSTANCE | {"data_seed": 0.5}}, r"`data_seed` must be an integer, got 0\.5"),
        ({"instance": 5}, r"an instance must be a mapping, got 5"),
    ],
)
def test_reset_refuses_wrong_options(make_env, options, message):
    env = make_env()

    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options=options)


# Settings that need the task or the machine


def test_make_refuses_an_unknown_device():
    with pytest.raises(ConfigError, match=r"`device` must be a torch device .*'warp'.*; use cpu"):
        entry_point(DIGITS, device="warp")


def test_make_refuses_a_device_that_is_not_there():
    missing = f"cuda:{torch.cuda.device_count()}"

    with pytest.raises(ConfigError, match=rf"`device` must be a torch device .*'{missing}'"):
        entry_point(DIGITS, device=missing)


def test_make_refuses_more_outer_valid_images_than_there_are():
    with pytest.raises(
        ConfigError, match=r"`outer_valid_size` must be <= 1000 .*, got 1001; lower"
    ):
        entry_point(DIGITS, outer_valid_size=1001)


def test_make_refuses_an_unknown_render_mode():
    with pytest.raises(ConfigError, match=r"`render_mode` must be one of .*, got 'human'"):
        entry_point(DIGITS, render_mode="human")


def test_make_refuses_unknown_settings_in_a_sentence():
    with pytest.raises(ConfigError, match=r"^`horizont` is unknown; known keys are action, "):
        gym.make(DIGITS, horizont=3)


def test_make_refuses_an_unknown_task():
    with pytest.raises(
        ValueError, match=r"`task` must be one of ASG/Digits-v0, .*, got 'ASG/None-v0'"
    ):
        entry_point("ASG/None-v0")
