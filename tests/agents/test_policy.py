import numpy as np
import pytest
from gymnasium import spaces

from agents.policy import RandomPolicy

GRID = spaces.MultiDiscrete([7] * 5)
BOX = spaces.Box(-1.0, 1.0, (5,), np.float32)


def actions(policy: RandomPolicy, count: int) -> np.ndarray:
    return np.stack([policy.predict(np.zeros(3))[0] for _ in range(count)])


@pytest.mark.parametrize("space", [GRID, BOX], ids=["grid", "box"])
def test_random_policy_stays_in_its_space(space):
    policy = RandomPolicy(space)
    assert all(space.contains(action) for action in actions(policy, 50))


@pytest.mark.parametrize("space", [GRID, BOX], ids=["grid", "box"])
def test_random_policy_follows_its_seed(space):
    first, second, other = RandomPolicy(space), RandomPolicy(space), RandomPolicy(space)
    first.seed(4)
    second.seed(4)
    other.seed(5)
    drawn = actions(first, 10)
    np.testing.assert_array_equal(drawn, actions(second, 10))
    assert not np.array_equal(drawn, actions(other, 10))


def test_random_policy_covers_every_choice_evenly():
    drawn = actions(RandomPolicy(GRID), 1400)
    shares = np.stack([(drawn == choice).mean(axis=0) for choice in range(7)])
    np.testing.assert_allclose(shares, 1 / 7, atol=0.04)


def test_random_policy_leaves_global_generators_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is tested
    actions(RandomPolicy(GRID), 5)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_random_policy_refuses_deterministic_actions():
    with pytest.raises(ValueError, match="`deterministic` must be False for a random policy"):
        RandomPolicy(GRID).predict(np.zeros(3), deterministic=True)
