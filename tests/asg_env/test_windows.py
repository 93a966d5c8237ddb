import pytest

from asg_env import windows
from asg_env.windows import constant_windows, growing_windows

VISDA = {"steps_per_epoch": 4763, "epochs": 30}
SEGMENTATION = {"steps_per_epoch": 2000, "epochs": 50}


@pytest.fixture
def _segmentation_minimum(monkeypatch):
    monkeypatch.setattr(windows, "MIN_WINDOW", 20)


def by_epoch(lengths, steps_per_epoch):
    """Cut a list of windows into epochs; every epoch has to be filled exactly."""
    epochs = [[]]
    for length in lengths:
        if sum(epochs[-1]) == steps_per_epoch:
            epochs.append([])
        epochs[-1].append(length)
        assert sum(epochs[-1]) <= steps_per_epoch
    assert sum(epochs[-1]) == steps_per_epoch
    return epochs


def test_constant_windows_repeat():
    assert constant_windows(7, 3) == (7, 7, 7)


# The tables of docs/original.md, section 2. The first window of each is ours: the original ran it
# before the first decision.


def test_growing_windows_as_coded_reproduce_the_table_of_visda():
    epochs = by_epoch(growing_windows("asg-as-coded", **VISDA), 4763)

    assert epochs[0] == [10, 10, 20, 40, 80, 160, 320, 640, 1280, 2203]
    assert epochs[1] == [238, 476, 952, 1904, 1193]


def test_growing_windows_as_coded_reproduce_the_decisions_of_visda():
    epochs = by_epoch(growing_windows("asg-as-coded", **VISDA), 4763)

    assert sum(map(len, epochs)) == 66 + 1
    assert {len(epoch) for epoch in epochs[20:]} == {1}


def test_growing_windows_as_intended_reproduce_the_decisions_of_visda():
    epochs = by_epoch(growing_windows("asg-intended", **VISDA), 4763)

    assert len(epochs[0]) == 85 + 1
    assert sum(map(len, epochs)) == 167 + 1


@pytest.mark.usefixtures("_segmentation_minimum")
def test_growing_windows_as_coded_reproduce_the_table_of_segmentation():
    epochs = by_epoch(growing_windows("asg-as-coded", **SEGMENTATION), 2000)

    assert epochs[0] == [20, 20, 40, 80, 160, 320, 640, 720]
    assert epochs[1] == [100, 200, 400, 800, 500]
    assert sum(map(len, epochs)) == 84 + 1


@pytest.mark.usefixtures("_segmentation_minimum")
def test_growing_windows_as_intended_reproduce_the_decisions_of_segmentation():
    epochs = by_epoch(growing_windows("asg-intended", **SEGMENTATION), 2000)

    assert len(epochs[0]) == 53 + 1
    assert sum(map(len, epochs)) == 155 + 1


@pytest.mark.parametrize(
    ("mode", "second_epoch"),
    # prev = 25: cur + 25 // 20 against (cur + 25) // 20, and never below 10.
    [("asg-as-coded", (10, 11, 4)), ("asg-intended", (10, 10, 5))],
)
def test_growing_windows_are_cut_at_the_end_of_a_short_epoch(mode, second_epoch):
    assert growing_windows(mode, steps_per_epoch=25, epochs=2) == (10, 10, 5, *second_epoch)
    assert growing_windows(mode, steps_per_epoch=4, epochs=3) == (4, 4, 4)
