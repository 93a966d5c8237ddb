import numpy as np
import pytest

from agents.sequence_ppo import SequencePPOSettings
from asg_env.config import EnvSettings
from benchmarks.sequence_ppo import HORIZON, Ours, Theirs, measure, nearest_size, times_faster

ENV = EnvSettings(observation="extended")
SMALL = SequencePPOSettings(
    episodes_per_update=4, episodes_per_minibatch=2, hidden_size=6, passes=1
)


class Recorder:
    """Acts in 1 second and updates in 2, times a factor; writes down its turns."""

    parameters = 0

    def __init__(self, name: str, factor: float, log: list, clock: list) -> None:
        self.name, self._factor, self._log, self._clock = name, factor, log, clock

    def act(self) -> None:
        self._log.append(self.name)
        self._clock[0] += self._factor

    def update(self) -> None:
        self._clock[0] += 2 * self._factor


def test_measure_takes_turns_and_leaves_the_first_update_out():
    log, now = [], [0.0]
    contenders = [Recorder("a", 1.0, log, now), Recorder("b", 3.0, log, now)]
    times = measure(contenders, repeats=2, clock=lambda: now[0])
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert times == [
        {"acting": [1.0] * 2, "updating": [2.0] * 2, "together": [3.0] * 2},
        {"acting": [3.0] * 2, "updating": [6.0] * 2, "together": [9.0] * 2},
    ]


def test_ratios_are_of_pairs():
    assert times_faster([1.0, 2.0, 4.0], [3.0, 2.0, 8.0]) == {
        "median": 2.0,
        "lowest": 1.0,
        "highest": 3.0,
    }


def test_ours_runs_whole_episodes_and_learns_from_them():
    ours = Ours(ENV, SMALL)
    network = ours._algorithm.policy.network
    before = network.actor.weight.detach().clone()
    ours.act()
    assert [len(e.rewards) for e in ours._episodes] == [HORIZON] * 4
    for episode in ours._episodes:
        np.testing.assert_array_equal(episode.rewards, episode.actions[:, 0] == 2)
    assert not np.array_equal(ours._episodes[0].actions, ours._episodes[1].actions)
    ours.update()
    assert not np.array_equal(network.actor.weight.detach(), before)


@pytest.mark.parametrize("environments", [1, 2])
def test_theirs_collects_as_many_env_steps_and_learns_from_them(environments):
    theirs = Theirs(ENV, SMALL, lstm=5, environments=environments)
    weight = theirs._model.policy.lstm_actor.weight_ih_l0
    before = weight.detach().clone()
    theirs.act()
    buffer = theirs._model.rollout_buffer
    assert buffer.rewards.size == 4 * HORIZON
    assert buffer.episode_starts.sum() == 4
    np.testing.assert_array_equal(buffer.rewards, buffer.actions[..., 0] == 2)
    theirs.update()
    assert not np.array_equal(weight.detach(), before)
    assert (theirs._model.batch_size, theirs._model.n_epochs) == (2 * HORIZON, 1)


def test_nearest_size_is_nearest_in_parameters():
    ours = Ours(ENV, SMALL).parameters
    size = nearest_size(ENV, SMALL, ours)
    distances = {s: abs(Theirs(ENV, SMALL, s, 1).parameters - ours) for s in range(3, 13)}
    assert distances[size] == min(distances.values())
    width, actions = 25, 15  # an LSTM, then a head for actions and one for the value
    lstm = 4 * size * (width + size) + 8 * size
    assert Theirs(ENV, SMALL, size, 1).parameters == lstm + (actions + 1) * (size + 1)
