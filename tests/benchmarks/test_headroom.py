import numpy as np
import pytest

from agents.benchmark.plan import Suite
from agents.rollout import RolloutPool
from asg_env.instances import Instance
from asg_env.validation import ConfigError
from benchmarks import headroom
from benchmarks.headroom import STATIC, Told

TASK = "ASG/Digits-v0"
TINY = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50, "instances": "unknown-scale"}


@pytest.fixture
def suite():
    return Suite("tiny", TASK, TINY)


def told(controller, progress=0.0, **instance):
    controller.begin(Instance(TASK, 0, 0, **instance), None)
    return controller.multipliers(progress, None)


def test_controllers_use_what_they_are_told_and_nothing_else():
    blind = Told({"": [[0.1, 1.0]]}, scale=False)
    assert told(blind, base_lr_scale=10.0, optimizer="adam") == [0.1, 1.0]
    scale = Told({"": [[0.1, 1.0]]}, scale=True)
    np.testing.assert_allclose(told(scale, base_lr_scale=10.0), [0.01, 0.1])
    assert told(scale, base_lr_scale=0.1) == [1.0, 1.0]  # an agent's range
    optimizer = Told({"sgd": [[0.1]], "adam": [[0.01]]}, scale=False)
    assert told(optimizer, optimizer="sgd") == [0.1]
    assert told(optimizer, optimizer="adam") == [0.01]
    thirds = Told({"": [[0.1], [0.2], [0.3]]}, scale=False)
    assert [told(thirds, p)[0] for p in (0.0, 0.34, 0.67, 1.0)] == [0.1, 0.2, 0.3, 0.3]


def test_every_row_is_searched_once_and_compared_with_the_first(suite, monkeypatch, tmp_path):
    out = tmp_path / "headroom.json"
    found = headroom.run(suite, 12, seeds=1, tests=2, workers=0, out=out)
    rows = found["rows"]
    assert list(rows) == [STATIC, "knows the scale", "near it", "near it, in thirds"]
    for done in rows.values():
        assert np.shape(done["0"]["scores"]) == (2,)
    assert np.shape(rows["near it, in thirds"]["0"]["vectors"][""]) == (3, 5)
    lines = headroom.table(found).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith(f"| {STATIC} | ")
    assert lines[2].endswith(" |  |")
    monkeypatch.setattr(headroom, "search", lambda *_: pytest.fail("it searched again"))
    assert headroom.run(suite, 12, seeds=1, tests=2, workers=0, out=out) == found
    with pytest.raises(ConfigError, match="another suite, version or budget; give another"):
        headroom.run(suite, 24, seeds=1, tests=2, workers=0, out=out)


def test_neighbours_are_at_most_a_level_away(suite, monkeypatch):
    tried = []

    def first(scorer, candidates, rungs):
        tried.extend(candidates.values())
        return next(iter(candidates)), 0.0

    monkeypatch.setattr(headroom, "successive_halving", first)
    start = [[0.0, 0.01, 0.1, 0.3, 1.0]]
    near = [{0.0, 0.003}, {0.003, 0.01, 0.03}, {0.03, 0.1, 0.3}, {0.1, 0.3, 1.0}, {0.3, 1.0}]
    with RolloutPool(TASK, suite.settings(), 0) as pool:
        best = headroom.search("near it, in thirds", suite, pool, 240, 0, start)
    assert best.vectors == {"": start * 3}  # the vector itself is the first candidate
    for controller in tried:
        for vector in controller.vectors[""]:
            assert all(m in levels for m, levels in zip(vector, near, strict=True))
    assert len(tried) == 36  # of 240 episodes: 4 for each, and two thirds of that once more
