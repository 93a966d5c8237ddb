"""The environment under Gymnasium's vector environments, in every autoreset mode."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

DIGITS = "ASG/Digits-v0"
SETTINGS = {"horizon": 2, "inner_steps": 2, "outer_valid_size": 50, "instances": "unknown-scale"}
STAY = np.ones((2, 5), np.int64)


@pytest.fixture(params=["sync", "async"])
def make_vec(request):
    made = []

    def make(mode):
        envs = gym.make_vec(
            DIGITS,
            num_envs=2,
            vectorization_mode=request.param,
            vector_kwargs={"autoreset_mode": mode},
            **SETTINGS,
        )
        made.append(envs)
        return envs

    yield make
    for envs in made:
        envs.close()


@pytest.fixture
def single_rollouts(make_env):
    """Transitions of the same two episodes, one environment each."""
    rollouts = []
    for seed in (0, 1):
        env = make_env(**SETTINGS)
        transitions = [env.reset(seed=seed)]
        transitions += [env.step(STAY[0]) for _ in range(2)]
        rollouts.append(transitions)
    return rollouts


def assert_first_episode_matches(envs, single_rollouts):
    """Reset and step twice; return the last step."""
    observations, infos = envs.reset(seed=0)
    first, second = single_rollouts
    np.testing.assert_array_equal(observations, [first[0][0], second[0][0]])
    assert infos["inner_step"].tolist() == [0, 0]
    assert infos["cause"].tolist() == ["", ""]
    observations, rewards, terminated, truncated, infos = envs.step(STAY)
    np.testing.assert_array_equal(observations, [first[1][0], second[1][0]])
    assert rewards.tolist() == [first[1][1], second[1][1]]
    assert terminated.tolist() == [False, False]
    np.testing.assert_array_equal(infos["effective_lrs"][1], second[1][-1]["effective_lrs"])
    last = envs.step(STAY)
    assert last[1].tolist() == [first[2][1], second[2][1]]
    assert last[2].tolist() == [True, True]
    assert last[3].tolist() == [False, False]
    return last


def test_vector_resets_at_the_next_step(make_vec, single_rollouts):
    envs = make_vec(AutoresetMode.NEXT_STEP)

    observations, *_, infos = assert_first_episode_matches(envs, single_rollouts)
    np.testing.assert_array_equal(observations, [single[2][0] for single in single_rollouts])
    assert infos["inner_step"].tolist() == [4, 4]
    _, rewards, terminated, _, infos = envs.step(STAY)

    assert infos["inner_step"].tolist() == [0, 0]
    assert rewards.tolist() == [0.0, 0.0]
    assert terminated.tolist() == [False, False]


def test_vector_resets_in_the_same_step(make_vec, single_rollouts):
    envs = make_vec(AutoresetMode.SAME_STEP)

    observations, *_, infos = assert_first_episode_matches(envs, single_rollouts)

    assert infos["inner_step"].tolist() == [0, 0]
    final = np.stack(infos["final_obs"])
    np.testing.assert_array_equal(final, [single[2][0] for single in single_rollouts])
    assert infos["final_info"]["inner_step"].tolist() == [4, 4]
    assert (observations != final).any()
    assert envs.step(STAY)[-1]["inner_step"].tolist() == [2, 2]


def test_vector_resets_when_told_to(make_vec, single_rollouts):
    envs = make_vec(AutoresetMode.DISABLED)

    assert_first_episode_matches(envs, single_rollouts)
    observations, infos = envs.reset(seed=0, options={"reset_mask": np.array([True, True])})
    np.testing.assert_array_equal(observations, [single[0][0] for single in single_rollouts])
    assert infos["inner_step"].tolist() == [0, 0]
    envs.step(STAY)
    envs.reset(seed=[7, None], options={"reset_mask": np.array([True, False])})

    infos = envs.step(STAY)[-1]

    assert infos["inner_step"].tolist() == [2, 4]


def test_vector_spaces_batch_the_single_ones(make_vec):
    envs = make_vec(AutoresetMode.NEXT_STEP)

    assert envs.observation_space.shape == (2, 9)
    assert envs.single_observation_space.shape == (9,)
    assert envs.action_space.contains(STAY)
