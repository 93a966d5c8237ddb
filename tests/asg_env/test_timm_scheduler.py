import json

import numpy as np
import pytest
import torch
from torch import nn

from asg_env.schedule import LearnedSchedule

pytest.importorskip("timm")


def sgd(model: nn.Module, learned: LearnedSchedule, base_lr: float | None = None):
    return torch.optim.SGD(learned.param_groups(model, base_lr), momentum=0.9)


def test_timm_scheduler_sets_the_same_rates(make_schedule, make_network):
    learned = make_schedule(lr_factor="warmup-poly", interpolation="linear", inner_steps=10)
    ours, theirs = sgd(make_network(), learned, 0.01), sgd(make_network(), learned, 0.01)
    torch_scheduler, scheduler = learned.to_torch(ours, 20), learned.to_timm(theirs, 20)
    expected, rates = [], []
    for step in range(20):
        expected.append([group["lr"] for group in ours.param_groups])
        ours.step()
        torch_scheduler.step()
        rates.append([group["lr"] for group in theirs.param_groups])
        scheduler.step_update(step + 1)
        if step % 5 == 4:
            scheduler.step(step // 5 + 1)  # the end of an epoch changes nothing
    assert rates == expected
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    scheduler.load_state_dict(state)
    with pytest.raises(ValueError, match="must be of 20 inner steps and 2 parameter groups, got 9"):
        scheduler.load_state_dict({**state, "total_steps": 9})
    with pytest.raises(ValueError, match="the same schedule, got that of another"):
        scheduler.load_state_dict({**state, "schedule_digest": 1})
    with pytest.raises(ValueError, match="in this order, got"):
        learned.to_timm(torch.optim.SGD(make_network().parameters(), lr=0.1), 20)


def test_timm_scheduler_resumes_at_the_rates_of_the_next_step(make_schedule, make_network):
    learned, model = make_schedule(interpolation="linear"), make_network()
    first = sgd(model, learned)
    scheduler = learned.to_timm(first, 20)
    for step in range(12):
        scheduler.step_update(step + 1)
    expected = [group["lr"] for group in first.param_groups]
    for optimizer_first in (True, False):
        again = sgd(model, learned)
        resumed = learned.to_timm(again, 20)
        if optimizer_first:
            again.load_state_dict(first.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        if not optimizer_first:
            again.load_state_dict(first.state_dict())
        assert [group["lr"] for group in again.param_groups] == expected


def test_timm_scheduler_refuses_what_is_no_state_of_its_own(make_schedule, make_network):
    learned = make_schedule()
    scheduler = learned.to_timm(sgd(make_network(), learned), 20)
    state = scheduler.state_dict()
    scheduler.step_update(np.int64(3))
    scheduler.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    with pytest.raises(ValueError, match="`num_updates` must be the inner steps done, .* got -1"):
        scheduler.load_state_dict({**state, "num_updates": -1})
    del state["num_updates"]
    with pytest.raises(ValueError, match="must hold total_steps, schedule_digest, base_values, n"):
        scheduler.load_state_dict(state)
