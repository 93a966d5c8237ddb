import csv
import io

import numpy as np
import pytest
import torch
from torch import nn

from agents.schedule_formats import to_csv, to_python
from asg_env.schedule import LearnedSchedule
from asg_env.validation import ConfigError


@pytest.fixture
def learned() -> LearnedSchedule:
    return LearnedSchedule(
        layer_groups={"body": r"0\.", "it's head": r"1\."},
        knots=(0.0, 0.25, 0.5),
        multipliers=((1.0, 0.1), (1 / 3, 0.2), (0.0, 0.4)),
        spread=((0.0, 0.0),) * 3,
        base_lr=0.3,
        optimizer="sgd",
        momentum_form="pytorch",
        lr_factor="constant",
        episodes=16,
        task="ASG/Digits-v0",
        instances="fixed",
        base_lr_scale=1.0,
        inner_steps=8,
        settings={},
    )


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def optimizer_of(learned):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return torch.optim.SGD(learned.param_groups(model))


@pytest.mark.parametrize("total", [3, 8, 100])
def test_the_python_snippet_alone_sets_the_same_rates(learned, total, recwarn):
    namespace = {}
    exec(compile(to_python(learned), "snippet.py", "exec"), namespace)
    theirs, ours = optimizer_of(learned), optimizer_of(learned)
    found = rates(namespace["learned_schedule"](theirs, total), theirs, total + 2)
    assert found == rates(learned.to_torch(ours, total), ours, total + 2)
    assert "asg_env" not in to_python(learned)
    function = to_python(learned).partition("def learned_schedule")[2]
    assert len(function.splitlines()) <= 10


@pytest.mark.parametrize("change", [{"interpolation": "linear"}, {"lr_factor": "warmup-poly"}])
def test_a_snippet_refuses_what_it_cannot_hold(learned, change):
    with pytest.raises(ConfigError, match=f"got .*{next(iter(change.values()))}.*; export json"):
        to_python(learned.with_changes(**change))


@pytest.mark.parametrize("factor", ["constant", "warmup-poly"])
def test_a_table_has_the_rates_of_every_inner_step(learned, factor):
    learned = learned.with_changes(lr_factor=factor, interpolation="linear")
    rows = list(csv.DictReader(io.StringIO(to_csv(learned))))
    optimizer = optimizer_of(learned)
    expected = rates(learned.to_torch(optimizer, 8), optimizer, 8)
    assert [int(row["inner_step"]) for row in rows] == list(range(8))
    assert [float(row["progress"]) for row in rows] == [step / 8 for step in range(8)]
    names = list(learned.layer_groups)
    np.testing.assert_array_equal([[float(r[f"lr/{n}"]) for n in names] for r in rows], expected)
    multipliers = [[float(r[f"multiplier/{n}"]) for n in names] for r in rows]
    np.testing.assert_allclose(multipliers, [learned.at(step / 8) for step in range(8)])
