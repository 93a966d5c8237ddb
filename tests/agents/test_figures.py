import dataclasses

import numpy as np
from matplotlib.figure import Figure

from agents import protocol
from agents.evaluate import Row
from agents.figures import _accuracy_curves, _heat_maps, on_windows

PROGRESS = np.array([0.0, 0.1, 0.3, 1.0])  # growing windows


def growing(make_episode):
    episode = make_episode([0.1] * 3, accuracy=[0.2, 0.3, 0.4])
    return dataclasses.replace(episode, progress=PROGRESS)


def judged(episode):
    return protocol.TestResult(episode, np.array([True]), recall=1.0, retention=1.0)


def test_heat_map_gives_each_window_its_width(make_episode):
    figure = Figure()
    _heat_maps(figure, [growing(make_episode)], ["head"])
    mesh = figure.axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], PROGRESS)
    assert figure.axes[0].get_xlim() == (0, 1)


def test_accuracy_curves_stand_where_windows_end(make_episode):
    episode = growing(make_episode)
    row = Row("controller (greedy)", "", [[judged(episode)]])
    axes = Figure().subplots()
    _accuracy_curves(axes, [row], "accuracy")
    np.testing.assert_allclose(axes.lines[0].get_xdata(), PROGRESS[1:])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), episode.accuracy)


def test_accuracy_curves_say_when_there_are_none(make_episode):
    row = Row("controller (greedy)", "", [[judged(make_episode([0.1] * 3))]])
    axes = Figure().subplots()
    _accuracy_curves(axes, [row], "accuracy")
    assert [text.get_text() for text in axes.texts] == ["the reward reads no real label"]


def test_episodes_of_other_horizons_are_drawn_by_progress():
    edges = np.linspace(0, 1, 5)
    short = on_windows(np.array([1.0, 2.0]), np.array([0, 0.5, 1.0]), edges)
    np.testing.assert_array_equal(short, [1, 1, 2, 2])
    same = on_windows(np.arange(8.0).reshape(4, 2), edges, edges)
    np.testing.assert_array_equal(same, np.arange(8.0).reshape(4, 2))
    diverged = on_windows(np.array([1.0, 2.0]), np.array([0, 0.25, 0.5]), edges)
    np.testing.assert_array_equal(diverged, [1, 2, np.nan, np.nan])
