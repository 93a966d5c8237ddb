"""Rewards add up, read no split that they must not, and stay finite when a training diverges."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from asg_env.rewards import REWARD_TERMS

OBSERVATIONS = ("asg", "scaled", "extended", "normalised")
STAY = [1] * 5
EVERY_TERM = dict.fromkeys(REWARD_TERMS, 1.0)
LABEL_FREE = [name for name, term in REWARD_TERMS.items() if term.split != "outer_valid"]


class RecordingSplits(dict):
    """Splits of a trainer that remember which of them was looked up."""

    def __init__(self, splits):
        super().__init__(splits)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def record_splits(env):
    env.trainer.splits = RecordingSplits(env.trainer.splits)
    return env.trainer.splits.read


# Rewards


def test_gain_adds_up_to_final_minus_initial_accuracy(make_env):
    env = make_env(start_multiplier=0.1, inner_steps=4)
    env.reset(seed=1)
    initial = env.trainer.evaluate("outer_valid").accuracy
    rewards = [env.step(STAY)[1] for _ in range(3)]

    final = env.trainer.evaluate("outer_valid").accuracy

    assert sum(rewards) == pytest.approx(final - initial)
    assert any(rewards)


def test_reward_is_the_weighted_sum_of_its_terms(make_env, rollout):
    weights = {name: 0.5 + i for i, name in enumerate(EVERY_TERM)}
    env = make_env(reward=weights, start_multiplier=0.1)

    for transition in rollout(env, seed=0)[1:]:
        info = transition[-1]
        expected = sum(weight * info[f"reward/{name}"] for name, weight in weights.items())
        assert transition[1] == pytest.approx(expected)
        assert isinstance(transition[1], float)


def test_reward_terms_agree_with_the_trainer(make_env):
    env = make_env(reward=EVERY_TERM, start_multiplier=0.1)
    env.reset(seed=0)
    before, agreed = env.trainer.evaluate("inner_valid"), env.trainer.agreement("old_task")
    objective = env.telemetry.objective
    info = env.step(STAY)[-1]
    now, outer = env.trainer.evaluate("inner_valid"), env.trainer.evaluate("outer_valid")

    assert info["reward/inner_valid_gain"] == pytest.approx(now.accuracy - before.accuracy)
    assert info["reward/inner_valid_level"] == now.accuracy
    assert info["reward/inner_valid_loss"] == -now.loss
    assert info["reward/level"] == info["accuracy/outer_valid"] == outer.accuracy
    assert info["reward/loss"] == -outer.loss
    assert info["reward/terminal"] == info["reward/inner_valid_terminal"] == 0.0
    assert info["reward/retention"] == pytest.approx(env.trainer.agreement("old_task") - agreed)
    assert info["reward/train_loss"] == pytest.approx(objective - env.telemetry.objective)


def test_terminal_reward_pays_the_final_accuracy(make_env, rollout):
    transitions = rollout(make_env(reward="terminal"), seed=0)[1:]

    assert [t[1] for t in transitions[:-1]] == [0.0, 0.0]
    assert transitions[-1][1] == transitions[-1][-1]["accuracy/outer_valid"] > 0


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("reward", LABEL_FREE)
def test_label_free_rewards_read_no_real_label(make_env, reward, observation, rollout):
    env = make_env(reward=reward, observation=observation)
    read = record_splits(env)

    infos = [transition[-1] for transition in rollout(env, seed=0)]

    assert read <= {"train", "inner_valid", "old_task"}
    assert not any("accuracy/outer_valid" in info for info in infos)


def test_label_free_rewards_do_not_depend_on_real_labels(make_env, identical, rollout):
    blind, seeing = (make_env(reward=dict.fromkeys(LABEL_FREE, 1.0)) for _ in range(2))
    for name in ("outer_valid", "test", "old_task"):
        split = blind.trainer.splits[name]
        no_labels = torch.full_like(split.labels, -1)  # torch refuses to score these
        blind.trainer.splits[name] = dataclasses.replace(split, labels=no_labels)

    assert identical(rollout(blind, seed=0), rollout(seeing, seed=0))


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("reward", ["gain", EVERY_TERM])
def test_no_reward_reads_the_test_split(make_env, reward, observation, rollout):
    env = make_env(reward=reward, observation=observation)
    read = record_splits(env)

    rollout(env, seed=0)

    assert "outer_valid" in read
    assert "test" not in read


def test_default_env_reads_training_and_outer_valid_images_alone(make_env, rollout):
    env = make_env()
    read = record_splits(env)

    rollout(env, seed=0)

    assert read == {"train", "outer_valid"}


def test_images_per_measurement_counts_the_splits_that_are_read(make_env):
    assert make_env().images_per_measurement == 50
    assert make_env(reward="train_loss").images_per_measurement == 0
    assert make_env(reward="inner_valid_gain", observation="extended").images_per_measurement == 500
    assert make_env(reward=EVERY_TERM).images_per_measurement == 50 + 500 + 500


def test_outer_valid_is_balanced_at_every_size(make_env):
    env = make_env(outer_valid_size=52)

    assert (
        sorted(env.trainer.splits["outer_valid"].labels.bincount().tolist()) == [10] * 3 + [11] * 2
    )


# Divergence


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_divergence_ends_the_episode_cleanly(make_env, observation, optimizer):
    env = make_env(
        observation=observation,
        optimizer=optimizer,
        reward=EVERY_TERM,
        base_lr=1e6,
        start_multiplier=1.0,
        inner_steps=3,
    )
    env.reset(seed=0)
    terminated, steps = False, 0
    while not terminated:
        observed, reward, terminated, truncated, info = env.step(STAY)
        steps += 1

    assert steps < 3
    assert not truncated
    assert np.isfinite(observed).all()
    assert env.observation_space.contains(observed)
    assert np.isfinite(reward)
    assert info["diverged"] is True
    assert info["cause"] in {
        "a training loss is not finite",
        "a gradient norm is not finite",
        "a weight is not finite",
    }
    numbers = [value for key, value in info.items() if key not in ("layer_groups", "cause")]
    assert all(np.isfinite(value).all() for value in numbers)
    assert info["accuracy/outer_valid"] == info["reward/level"] == info["reward/terminal"] == 0.0
    with pytest.raises(ResetNeeded):
        env.step(STAY)


@pytest.mark.parametrize("reward", REWARD_TERMS)
def test_divergence_leaves_every_reward_finite(make_env, reward, rollout):
    env = make_env(reward=reward, base_lr=1e6, start_multiplier=1.0, inner_steps=3)

    *_, last = rollout(env, seed=0)

    assert last[-1]["diverged"]
    assert np.isfinite(last[1])
    assert last[1] <= 0.0


def test_divergence_takes_back_the_accuracy_that_was_gained(make_env):
    env = make_env(base_lr=1e6, start_multiplier=1.0, inner_steps=3)
    _, info = env.reset(seed=0)

    reward = env.step(STAY)[1]

    assert reward == pytest.approx(-info["accuracy/outer_valid"])


def test_divergence_does_not_reach_the_next_episode(make_env, identical, rollout):
    used, fresh = make_env(observation="extended"), make_env(observation="extended")
    used.reset(seed=0)
    assert used.step_multipliers([1e12] * 5)[-1]["diverged"]

    assert identical(rollout(used, seed=1), rollout(fresh, seed=1))
