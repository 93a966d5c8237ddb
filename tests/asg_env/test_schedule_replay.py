"""The environment's training, in a plain loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asg_env.config import EnvSettings
from asg_env.core.data import DataOrder
from asg_env.core.optimizers import ScaledVelocitySGD
from asg_env.core.seeding import torch_generator
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import load_task

TASK = "ASG/Digits-v0"


def replay(settings: EnvSettings, learned: LearnedSchedule, instance: Instance) -> nn.Module:
    """What a user writes: torch and the schedule; the data order and the head are theirs."""
    task = load_task(TASK)
    model, train = task.optimizee, task.splits["train"]
    images = (train.images.float() - train.mean) / train.std
    with torch.no_grad():  # the teacher, in the batches in which the environment asks it
        teacher = torch.cat([model(images[i : i + 512])[1] for i in range(0, len(images), 512)])
        teacher = torch.log_softmax(teacher, dim=1)
    model.initialise_head(torch_generator(instance.head_seed, "head"))
    total = sum(settings.windows())
    order = DataOrder(len(train), settings.batch_size, instance.data_seed, torch.device("cpu"))

    form = torch.optim.SGD if settings.momentum_form == "pytorch" else ScaledVelocitySGD
    optimizer = form(learned.param_groups(model), momentum=0.9, weight_decay=5e-4)
    scheduler = learned.to_torch(optimizer, total_steps=total)
    for step in range(total):
        index = order.indices(step)
        logits, old_logits = model(images[index])
        kl = F.kl_div(
            torch.log_softmax(old_logits, dim=1),
            teacher[index],
            log_target=True,
            reduction="batchmean",
        )
        loss = F.cross_entropy(logits, train.labels[index]) + 0.1 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


@pytest.mark.parametrize("factor", ["constant", "warmup-poly"])
@pytest.mark.parametrize("form", ["pytorch", "scaled-velocity"])
def test_schedule_replays_the_environments_training_bit_for_bit(form, factor, make_schedule):
    settings = EnvSettings(
        horizon=4, inner_steps=3, outer_valid_size=50, momentum_form=form, lr_factor=factor
    )
    instance = Instance(TASK, head_seed=1, data_seed=2)
    multipliers = np.random.default_rng(3).random((4, 5)).tolist()
    multipliers[1][0] = 0.0  # where the two forms of momentum part
    env = LayerwiseLREnv(TASK, settings)
    env.reset(options={"instance": instance})
    for row in multipliers:
        env.step_multipliers(row)
    learned = make_schedule(
        layer_groups=dict(env.trainer.patterns),
        knots=(0.0, 3 / 12, 6 / 12, 9 / 12),
        multipliers=tuple(map(tuple, multipliers)),
        spread=((0.0,) * 5,) * 4,
        base_lr=settings.base_lr,
        momentum_form=form,
        lr_factor=factor,
        inner_steps=12,
    )
    model = replay(settings, learned, instance)
    expected = env.trainer.optimizee.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # The control: other multipliers in the last window give other weights.
    last = tuple(2 * m for m in learned.multipliers[-1])
    other = replay(
        settings, learned.with_changes(multipliers=(*learned.multipliers[:-1], last)), instance
    )
    assert not torch.equal(other.head_weight(), model.head_weight())
