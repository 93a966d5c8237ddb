import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from asg_env.rendering import EpisodeHistory, render_ansi, render_rgb_array


def step(*multipliers, accuracy=None):
    info = {"lr_multipliers": np.array(multipliers), "loss/ce": 1.25, "loss/kl": 0.5}
    return info if accuracy is None else info | {"accuracy/outer_valid": accuracy}


@pytest.fixture
def history():
    history = EpisodeHistory(("early", "head"), horizon=4)
    history.append(step(0.0, 1.0, accuracy=0.25))
    history.append(step(0.03, 0.1, accuracy=0.375))
    return history


def test_render_ansi_draws_a_row_per_group_and_a_cell_per_env_step(history):
    early, head, state = render_ansi(history).splitlines()

    assert early == "early | =__| 0.03"
    assert head == " head |@*__| 0.1"
    assert state == "step 2/4  ce 1.2500  kl 0.5000  accuracy 0.375"


def test_render_ansi_leaves_accuracy_out_where_it_is_not_read():
    history = EpisodeHistory(("early", "head"), horizon=4)
    history.append(step(1.0, 1.0))

    assert "accuracy" not in render_ansi(history)


def test_render_ansi_draws_an_empty_map_before_the_first_step():
    assert render_ansi(EpisodeHistory(("a", "bc"), 3)) == " a |___| -\nbc |___| -"


def test_render_rgb_array_changes_with_the_history(history):
    empty = render_rgb_array(EpisodeHistory(("early", "head"), 4))
    drawn = render_rgb_array(history)

    assert drawn.shape == empty.shape == (320, 800, 3)
    assert drawn.dtype == np.uint8
    assert (drawn != empty).any()


def test_history_copy_is_independent(history):
    twin = history.copy()
    history.append(step(1.0, 1.0))

    assert len(twin.ce) == 2
    assert len(twin.multipliers) == 2


def test_render_needs_a_reset(make_env):
    env = make_env(render_mode="ansi")

    with pytest.raises(ResetNeeded, match="nothing to render"):
        env.render()


def test_render_follows_the_episode_as_text(make_env):
    env = make_env(render_mode="ansi", action="grid", grid="linear", start_multiplier=1.0)
    env.reset(seed=0)
    assert "step" not in env.render()
    env.step([0, 10, 10, 10, 10])

    lines = env.render().splitlines()

    assert len(lines) == 6
    assert lines[0] == "conv1 | __| 0"
    assert lines[1] == "conv2 |@__| 1"
    assert lines[-1].startswith("step 1/3")


@pytest.mark.parametrize("reward", ["gain", "train_loss"])
def test_render_follows_the_episode_as_picture(make_env, reward):
    env = make_env(render_mode="rgb_array", reward=reward)
    env.reset(seed=0)
    env.step([1] * 5)

    picture = env.render()

    assert picture.shape == (320, 800, 3)
    assert picture.dtype == np.uint8


def test_render_without_a_mode_warns(make_env):
    env = make_env()
    env.reset(seed=0)

    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
