"""The live controller in a plain PyTorch loop, against the environment that it was trained in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agents.l2o_controller import L2OController
from agents.rollout import run_policy
from asg_env.core.data import DataOrder
from asg_env.core.layer_groups import build_param_groups
from asg_env.core.optimizers import ScaledVelocitySGD
from asg_env.core.seeding import torch_generator
from asg_env.tasks import load_task

TASK = "ASG/Digits-v0"


class Loop:
    """What a user writes: torch, the controller, their own images, head and data order."""

    def __init__(self, settings, controller, instance, seed=17) -> None:
        task = load_task(TASK)
        self.model, self.settings, self.train = task.optimizee, settings, task.splits["train"]
        self.valid = task.splits["inner_valid"]
        images = self.normalised(self.train)
        with torch.no_grad():
            batches = [self.model(images[i : i + 512])[1] for i in range(0, len(images), 512)]
            self.teacher = torch.log_softmax(torch.cat(batches), dim=1)
        self.images = images
        self.model.initialise_head(torch_generator(instance.head_seed, "head"))
        size, device = settings.batch_size, torch.device("cpu")
        self.order = DataOrder(len(self.train), size, instance.data_seed, device)
        groups = build_param_groups(self.model, task.layer_groups, settings.base_lr)
        form = torch.optim.SGD if settings.momentum_form == "pytorch" else ScaledVelocitySGD
        self.optimizer = form(groups, momentum=0.9, weight_decay=5e-4)
        self.total, self.step = sum(settings.windows()), 0
        self.rates = []
        self.controller = L2OController(
            self.optimizer,
            controller,
            self.total,
            classes=5,
            inner_valid=self.inner_valid,
            seed=seed,
        )

    @staticmethod
    def normalised(split):
        return (split.images.float() - split.mean) / split.std

    @torch.no_grad()
    def inner_valid(self) -> float:
        logits = self.model(self.normalised(self.valid))[0]
        return F.cross_entropy(logits.double(), self.valid.labels).item()

    def losses(self, steps):
        index = torch.cat([self.order.indices(step) for step in steps])
        logits, old_logits = self.model(self.images[index])
        old = torch.log_softmax(old_logits, dim=1)
        kl = F.kl_div(old, self.teacher[index], log_target=True, reduction="batchmean")
        return F.cross_entropy(logits, self.train.labels[index]), kl

    def begin(self):
        with torch.no_grad():
            ce, kl = self.losses(range(min(4, self.settings.windows()[0])))
        self.controller.begin(ce=ce, kl=kl)
        return self

    def run(self, steps):
        for _ in range(steps):
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            ce, kl = self.losses([self.step])
            self.optimizer.zero_grad()
            (ce + 0.1 * kl).backward()
            self.optimizer.step()
            self.controller.step(ce=ce, kl=kl)
            self.step += 1
        return self

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
        }


SMALL = {"horizon": 4, "inner_steps": 3, "outer_valid_size": 50}


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("kind", ["coordinate-wise", "per-feature"])
@pytest.mark.parametrize(
    "changes",
    [
        {"observation": "scaled"},
        {"observation": "asg", "action": "grid", "grid": "linear", "base_lr": 0.02},
        {"observation": "normalised"},
        {"observation": "scaled", "lr_factor": "warmup-poly", "momentum_form": "scaled-velocity"},
        {"inner_steps": "asg-as-coded", "steps_per_epoch": 15, "epochs": 2, "horizon": None},
    ],
    ids=["scaled", "asg", "normalised", "warm-up", "growing-windows"],
)
def test_a_plain_loop_trains_as_the_environment_does_bit_for_bit(
    make_env, controller_for, instance, changes, kind, greedy
):
    env = make_env(**{**SMALL, **changes})
    controller = controller_for(env.settings, kind, greedy)
    policy = controller.policy(env.trainer.layer_groups)
    episode = run_policy(env, policy, instance, seed=17, deterministic=greedy)
    windows = env.settings.windows()
    loop = Loop(env.settings, controller, instance).begin().run(sum(windows))
    expected = env.trainer.optimizee.state_dict()
    starts = [0, *np.cumsum(windows)[:-1]]
    rates = np.array(loop.rates)[starts] / env.settings.base_lr
    if env.settings.lr_factor == "constant":
        np.testing.assert_allclose(rates, episode.multipliers, rtol=1e-12)
    assert np.ptp(episode.multipliers) > 0
    for name, tensor in loop.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_another_seed_draws_other_actions(make_settings, controller_for, instance):
    settings = make_settings(**SMALL)
    controller = controller_for(settings, greedy=False)
    first, again, other = (
        Loop(settings, controller, instance, seed).begin().run(12).rates for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("at", [0, 2, 3, 5, 11, 12])
@pytest.mark.parametrize("observation", ["scaled", "normalised"])
def test_resuming_repeats_the_uninterrupted_training(
    make_settings, controller_for, instance, tmp_path, observation, at
):
    settings = make_settings(**{**SMALL, "observation": observation})
    controller = controller_for(settings, greedy=False)
    whole = Loop(settings, controller, instance).begin().run(12)
    first = Loop(settings, controller, instance).begin().run(at)
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = Loop(settings, controller, instance)
    second.step = at
    second.model.load_state_dict(stored["model"])
    second.optimizer.load_state_dict(stored["optimizer"])
    second.controller.load_state_dict(stored["controller"])
    second.run(12 - at)
    assert first.rates + second.rates == whole.rates
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.controller.multipliers == whole.controller.multipliers
