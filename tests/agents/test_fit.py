from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.baselines import Static
from agents.fit import LiveController, ScheduleController, fit
from agents.lstm_policy import LSTMPolicyNetwork
from agents.policy import RandomPolicy
from agents.recurrent_policy import RecurrentPolicy, layout_of
from agents.rollout import run_controller, run_policy
from agents.sb3.algorithms import spaces_of
from asg_env.build import build_trainer
from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import Course
from asg_env.tasks import load_task

TASK = "ASG/Digits-v0"


def lively_policy(settings) -> RecurrentPolicy:
    """Weights large enough that observation and memory move the actions."""
    generator = torch.Generator().manual_seed(5)
    network = LSTMPolicyNetwork(layout_of(TASK, settings), 6, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 1.0, generator=generator)
    return RecurrentPolicy(network)


class Watched:
    """A policy, and what it was shown."""

    def __init__(self, policy) -> None:
        self._policy, self.seen = policy, []

    def predict(self, observation, *arguments, **keywords):
        self.seen.append(observation)
        return self._policy.predict(observation, *arguments, **keywords)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.optimizee.state_dict().items()}


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def schedule_of(settings, multipliers) -> LearnedSchedule:
    windows = settings.windows()
    starts = np.cumsum((0, *windows[:-1]))
    return LearnedSchedule(
        layer_groups=dict(load_task(TASK).layer_groups),
        knots=tuple((starts / sum(windows)).tolist()),
        multipliers=tuple(map(tuple, multipliers)),
        spread=tuple(map(tuple, np.zeros_like(multipliers).tolist())),
        base_lr=settings.base_lr,
        optimizer="sgd",
        momentum_form=settings.momentum_form,
        lr_factor=settings.lr_factor,
        episodes=1,
        task=TASK,
        instances="fixed",
        base_lr_scale=1.0,
        inner_steps=sum(windows),
        settings=settings.model_dump(exclude_none=True),
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"observation": "scaled"},
        {"observation": "asg", "action": "grid", "grid": "linear", "base_lr": 0.02},
        {"observation": "extended"},
        {"observation": "scaled", "reward": "train_loss", "momentum_form": "scaled-velocity"},
        {
            "observation": "extended",
            "horizon": None,
            "inner_steps": "asg-intended",
            "steps_per_epoch": 15,
            "epochs": 2,
        },
    ],
    ids=["scaled", "asg", "extended", "no-real-label", "growing-windows"],
)
def test_live_controller_trains_as_the_environment_does_bit_for_bit(
    make_env, instance, changes, deterministic
):
    env = make_env(**changes)
    policy = lively_policy(env.settings)
    episode = run_policy(env, policy, instance, seed=17, deterministic=deterministic)
    expected = weights(env.trainer)
    trainer = build_trainer(TASK, env.settings)
    policy.seed(17)
    watched = Watched(policy)
    controller = LiveController(watched, env.settings, trainer, deterministic)
    records = fit(trainer, controller, instance, env.settings.windows())
    np.testing.assert_array_equal(watched.seen, episode.observations)
    assert_same_weights(weights(trainer), expected)
    assert np.ptp(episode.multipliers) > 0  # the policy did something
    np.testing.assert_array_equal([r["lr_multipliers"] for r in records], episode.multipliers)
    np.testing.assert_array_equal([r["ce"] for r in records], episode.ce)
    np.testing.assert_array_equal([r["kl"] for r in records], episode.kl)


def test_live_controller_with_box_actions_trains_as_the_environment_does(make_env, instance):
    env = make_env(action="box", start_multiplier=0.05)
    policy = RandomPolicy(env.action_space)
    episode = run_policy(env, policy, instance, seed=3, deterministic=False)
    expected = weights(env.trainer)
    trainer = build_trainer(TASK, env.settings)
    policy.seed(3)
    records = fit(
        trainer,
        LiveController(policy, env.settings, trainer, False),
        instance,
        env.settings.windows(),
    )
    np.testing.assert_array_equal([r["lr_multipliers"] for r in records], episode.multipliers)
    assert_same_weights(weights(trainer), expected)


def test_live_controller_differs_with_another_seed(make_env, instance):
    env = make_env()
    policy = lively_policy(env.settings)
    episode = run_policy(env, policy, instance, seed=17, deterministic=False)
    trainer = build_trainer(TASK, env.settings)
    policy.seed(18)  # the control
    controller = LiveController(policy, env.settings, trainer, False)
    records = fit(trainer, controller, instance, env.settings.windows())
    assert not np.array_equal([r["lr_multipliers"] for r in records], episode.multipliers)


def test_live_controller_reads_no_real_label(make_settings, instance, monkeypatch):
    settings = make_settings(observation="extended")
    trainer = build_trainer(TASK, settings)
    for split in ("outer_valid", "test"):
        monkeypatch.delitem(trainer.splits, split)
    policy = lively_policy(settings)
    controller = LiveController(policy, settings, trainer, False)
    assert len(fit(trainer, controller, instance, settings.windows())) == 3


@pytest.mark.parametrize("form", ["pytorch", "scaled-velocity"])
def test_schedule_controller_trains_as_the_environment_at_the_same_multipliers(
    make_env, instance, form
):
    env = make_env(momentum_form=form, lr_factor="warmup-poly")
    multipliers = np.random.default_rng(0).random((3, 5)).tolist()
    env.reset(options={"instance": instance})
    for row in multipliers:
        env.step_multipliers(row)
    expected = weights(env.trainer)
    trainer = build_trainer(TASK, env.settings)
    learned = schedule_of(env.settings, multipliers)
    controller = ScheduleController(Course(learned, sum(env.settings.windows())))
    assert controller.windows == env.settings.windows()
    records = fit(trainer, controller, instance, controller.windows)
    assert [r["lr_multipliers"] for r in records] == multipliers
    assert_same_weights(weights(trainer), expected)


@pytest.mark.parametrize("interpolation", ["step", "linear", "log-linear"])
def test_fit_takes_the_rates_that_the_scheduler_takes(make_settings, instance, interpolation):
    settings = make_settings(inner_steps=5)  # 15 inner steps: the knots are within windows
    multipliers = (0.1 * np.random.default_rng(0).random((3, 5))).tolist()
    learned = schedule_of(settings, multipliers).with_changes(
        knots=(0.0, 0.3, 0.5), interpolation=interpolation
    )
    controller = ScheduleController(Course(learned, 15))
    trainer = build_trainer(TASK, settings)
    records = fit(trainer, controller, instance, controller.windows)
    optimizer = torch.optim.SGD(learned.param_groups(trainer.optimizee))
    scheduler, starts = learned.to_torch(optimizer, 15), {r["inner_step"] for r in records[:-1]}
    rates = [learned.multipliers[0]]
    for step in range(1, 15):
        optimizer.step()
        scheduler.step()
        if step in starts:
            rates.append(tuple(rate / learned.base_lr for rate in scheduler.get_last_lr()))
    assert len(rates) == (3 if interpolation == "step" else 15)
    np.testing.assert_allclose([r["lr_multipliers"] for r in records], rates, rtol=1e-12)


def test_fit_runs_a_baseline_as_the_evaluation_does(make_env, instance):
    env = make_env()
    run_controller(env, Static((0.1, 0.2, 0.3, 0.4, 0.5)), instance)
    expected = weights(env.trainer)
    trainer = build_trainer(TASK, env.settings)
    fit(trainer, Static((0.1, 0.2, 0.3, 0.4, 0.5)), instance, env.settings.windows())
    assert_same_weights(weights(trainer), expected)


def test_fit_records_every_window(make_settings, instance):
    settings = make_settings()
    trainer = build_trainer(TASK, settings)
    records = fit(trainer, Static((0.1,) * 5), instance, settings.windows())
    assert [record["inner_step"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["lr_multipliers"] == [0.1] * 5
        assert np.isfinite([record["ce"], record["kl"]]).all()
        assert record["diverged"] is False


def test_fit_stops_when_the_training_diverges(make_settings, instance):
    settings = make_settings(base_lr=1e25)
    trainer = build_trainer(TASK, settings)
    records = fit(trainer, Static((1.0,) * 5), instance, settings.windows())
    assert records[-1]["diverged"]
    assert not any(record["diverged"] for record in records[:-1])
    assert len(records) < 3


def test_fit_scales_the_base_rate_by_the_instance(make_settings, instance):
    settings = make_settings()
    trainer = build_trainer(TASK, settings)
    fit(trainer, Static((0.2,) * 5), instance, settings.windows())
    expected = weights(trainer)
    scaled = replace(instance, base_lr_scale=2.0)
    fit(trainer, Static((0.1,) * 5), scaled, settings.windows())
    assert_same_weights(weights(trainer), expected)


@pytest.mark.parametrize("spaces", ["lstm", "sb3"])
def test_agents_read_further_guidance_terms_where_the_environment_puts_them(
    make_env, make_settings, spaces
):
    values = {"observation": "extended", "guidance": {"kl": 0.1, "weight_l2": 0.0, "ewc": 0.5}}
    env, settings = make_env(**values), make_settings(**values)
    if spaces == "sb3":
        assert spaces_of(TASK, settings) == (env.observation_space, env.action_space)
        return
    layout, labels = layout_of(TASK, settings), env.observation_labels
    assert labels[5:7] == ("log_weight_l2", "log_ewc")
    assert [labels[i] for i in layout.shared] == [name for name in labels if "/" not in name]
    for group, columns in zip(env.trainer.layer_groups, layout.per_group, strict=True):
        assert [labels[i].rpartition("/")[2] for i in columns] == [group] * 4
