from types import SimpleNamespace

import numpy as np
import pytest

from agents.benchmark.plan import Suite
from agents.rollout import RolloutPool
from asg_env.instances import Instance
from asg_env.validation import ConfigError
from benchmarks import headroom
from benchmarks.headroom import STATIC, Following, Told

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
    assert list(rows) == [
        STATIC,
        "knows the scale",
        "near it",
        "near it, in thirds",
        "by update ratio",
    ]
    for done in rows.values():
        assert np.shape(done["0"]["scores"]) == (2,)
    assert np.shape(rows["near it, in thirds"]["0"]["vectors"][""]) == (3, 5)
    lines = headroom.table(found).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].startswith(f"| {STATIC} | ")
    assert lines[2].endswith(" |  |")
    monkeypatch.setattr(headroom, "search", lambda *_: pytest.fail("it searched again"))
    assert headroom.run(suite, 12, seeds=1, tests=2, workers=0, out=out) == found
    with pytest.raises(ConfigError, match="another suite, version or budget; give another"):
        headroom.run(suite, 24, seeds=1, tests=2, workers=0, out=out)


def test_multipliers_follow_the_update_ratio_a_level_a_window():
    grid = (0.0, 0.01, 0.1, 1.0)
    following = Following({"": [[0.0, 0.1, 0.1, 0.1, 0.1]]}, grid, start=0.1)
    following.begin(Instance(TASK, 0, 0), None)
    assert following.multipliers(0.0, None) == [0.1] * 5

    def after(*ratios):
        return following.multipliers(0.5, SimpleNamespace(update_ratios=ratios))

    assert after(0.1, 0.001, 0.06, 0.17, 2.0) == [0.01, 1.0, 0.1, 0.1, 0.01]
    assert after(0.1, 0.001, 0.1, 0.1, 2.0) == [0.0, 1.0, 0.1, 0.1, 0.0]
    assert after(0.0, 0.1, 0.1, 0.1, 0.0) == [0.0, 1.0, 0.1, 0.1, 0.01]


def test_neighbours_are_at_most_two_levels_away(suite, monkeypatch):
    tried = []

    def first(scorer, candidates, rungs):
        tried.extend(candidates.values())
        return next(iter(candidates)), 0.0

    monkeypatch.setattr(headroom, "successive_halving", first)
    start = [[0.0, 0.01, 0.1, 0.3, 1.0]]
    near = [
        {0.0, 0.003, 0.01},
        {0.0, 0.003, 0.01, 0.03, 0.1},
        {0.01, 0.03, 0.1, 0.3, 1.0},
        {0.03, 0.1, 0.3, 1.0},
        {0.1, 0.3, 1.0},
    ]
    with RolloutPool(TASK, suite.settings(), 0) as pool:
        best = headroom.search("near it, in thirds", suite, pool, 240, 0, start)
    assert best.vectors == {"": start * 3}  # the vector itself is the first candidate
    for controller in tried:
        for vector in controller.vectors[""]:
            assert all(m in levels for m, levels in zip(vector, near, strict=True))
    assert len(tried) == 36  # of 240 episodes: 4 for each, and two thirds of that once more


@pytest.mark.parametrize("name", headroom.ROWS)
def test_every_row_has_as_many_different_candidates_and_the_same_budget(name, monkeypatch):
    spent, tried = [], []

    class Counter:
        def __init__(self, pool, instances):
            self.instances = instances

        def score(self, candidates, instances):
            tried.append(len(candidates))
            spent.append(instances * len(candidates))
            optimizers = {instance.optimizer for instance in self.instances}
            assert len(optimizers) == (1 if headroom.ROWS[name].optimizer else 2)
            return {key: float(len(key)) for key in candidates}

    monkeypatch.setattr(headroom, "Scorer", Counter)
    suite = Suite("tiny", TASK, {"instances": "mixed"})
    corner = [[0.0, 0.0, 1.0, 0.0, 1.0]]  # has the fewest neighbours
    best = headroom.search(name, suite, None, 40, 0, corner)
    optimizers = 2 if headroom.ROWS[name].optimizer else 1
    assert tried == [10 // optimizers] * optimizers  # one rung of four instances each
    assert sum(spent) == 40
    assert set(best.vectors) == ({"adam", "sgd"} if optimizers == 2 else {""})


def test_a_suite_whose_test_instances_alone_vary_has_no_rows_that_know_it(monkeypatch, tmp_path):
    def no_search(name, *_):
        return Told({"": [[0.01] * 5]}, scale=False)

    monkeypatch.setattr(headroom, "search", no_search)
    suite = Suite("tiny", TASK, {**TINY, "instances": "transfer"})
    found = headroom.run(suite, 12, seeds=1, tests=1, workers=0, out=tmp_path / "headroom.json")
    assert not [name for name in found["rows"] if "optimizer" in name or "both" in name]


@pytest.mark.parametrize(("episodes", "message"), [(3, "must be >= 4, got 3"), (9000, "be lower")])
def test_budgets_that_no_search_fits_are_refused(suite, episodes, message):
    with pytest.raises(ConfigError, match=message):
        headroom.search(STATIC, suite, None, episodes, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "nonsense"),
        (["--suite", "digits-unknown-scale"], "damaged"),
    ],
)
def test_mistakes_give_a_sentence(monkeypatch, capsys, tmp_path, arguments, message):
    out = tmp_path / "headroom.json"
    out.write_text("{")
    monkeypatch.setattr("sys.argv", ["headroom", "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as stop:
        headroom.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
