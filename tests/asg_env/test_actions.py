import numpy as np
import pytest

from asg_env.actions import ACTIONS, GRIDS, BoxAction, GridAction, RelativeAction, grid_positions

STANDING = (0.0, 0.01, 1.0)


def test_grids_hold_the_original_levels_and_ours():
    assert GRIDS["linear"] == tuple(round(0.1 * i, 1) for i in range(11))
    assert GRIDS["log"] == (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@pytest.mark.parametrize("grid", GRIDS)
def test_grid_action_reaches_every_level(grid):
    action = GridAction(grid, 3)
    levels = len(GRIDS[grid])

    assert action.space.nvec.tolist() == [levels] * 3
    decoded = [action.decode([level] * 3, STANDING)[0] for level in range(levels)]
    assert tuple(decoded) == GRIDS[grid]


def test_relative_action_steps_down_stays_and_steps_up():
    action = RelativeAction("log", 3)
    standing = (0.03, 0.03, 0.03)

    assert action.space.nvec.tolist() == [3] * 3
    assert action.decode([0, 1, 2], standing) == (0.01, 0.03, 0.1)


def test_relative_action_holds_at_the_ends_of_the_grid():
    action = RelativeAction("log", 2)

    assert action.decode([0, 2], (0.0, 1.0)) == (0.0, 1.0)
    assert action.decode([2, 0], (0.0, 1.0)) == (0.003, 0.3)


def test_relative_action_starts_at_the_nearest_level():
    assert RelativeAction("log", 3).decode([1, 1, 2], (0.25, 5.0, 0.014)) == (0.3, 1.0, 0.03)


def test_relative_action_refuses_a_wrong_number_of_groups():
    with pytest.raises(ValueError, match="longer"):
        RelativeAction("log", 2).decode([1, 1], (0.1, 0.1, 0.1))


def test_box_action_spans_three_decades():
    action = BoxAction("log", 3)

    np.testing.assert_allclose(action.decode([-1.0, 0.0, 1.0], STANDING), [1e-3, 10**-1.5, 1.0])
    assert action.space.shape == (3,)
    assert action.space.dtype == np.float32


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_decode_to_python_floats_in_bounds(name):
    action = ACTIONS[name]("log", 3)
    action.space.seed(0)

    for _ in range(20):
        multipliers = action.decode(action.space.sample(), STANDING)
        assert all(type(m) is float and 0 <= m <= 1 for m in multipliers)


def test_grid_positions_are_even_over_the_levels():
    positions = grid_positions(GRIDS["log"], "log")

    np.testing.assert_allclose(positions, np.linspace(-1, 1, 7))
    assert grid_positions([0.02], "log")[0] == pytest.approx(-0.5 / 3)  # midway from 0.01 to 0.03
