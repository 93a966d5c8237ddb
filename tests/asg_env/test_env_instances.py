"""Instances that have an optimizer, digits, a width, a target or a horizon of their own."""

import numpy as np
import pytest

from asg_env.build import prepare_variants
from asg_env.instances import Instance, draw_instance, published_test_instances, variants
from asg_env.task_settings import DigitsSettings
from asg_env.tasks import digits
from asg_env.validation import ConfigError

DIGITS = "ASG/Digits-v0"
OWN = {
    "optimizer": "adam",
    "batch_size": 16,
    "horizon": 2,
    "classes": (1, 3, 5, 7, 9),
    "width": 0.5,
}
TINY = {"inner_steps": 2, "outer_valid_size": 50, "observation": "extended"}


@pytest.fixture(autouse=True)
def _quick_teachers(monkeypatch):
    """Teachers trained for three steps, kept in memory."""
    kept = {}
    monkeypatch.setattr(digits, "TEACHER_STEPS", 3)

    def teacher(classes, width):
        if (classes, width) not in kept:
            arrays = digits.load_images(digits.IMAGE_SIZE, classes)
            model, _ = digits.train_teacher(arrays, digits.scaled_widths(width))
            kept[classes, width] = model.state_dict()
        return kept[classes, width]

    monkeypatch.setattr(digits, "cached_teacher", teacher)


def rollout(env, instance, move=2):
    transitions = [env.reset(options={"instance": instance})]
    while len(transitions) == 1 or not transitions[-1][2]:
        transitions.append(env.step([move] * 5))
    return transitions


def test_an_instance_trains_as_settings_of_its_values_would(make_env, identical):
    bare = Instance(DIGITS, 1, 2, 0.5)
    own = Instance(DIGITS, 1, 2, 0.5, **OWN)

    in_a_set = rollout(make_env(instances="mixed", horizon=None, **TINY), own)
    by_settings = rollout(make_env(**OWN, **TINY), bare)

    assert len(in_a_set) == 3  # its own horizon
    assert identical(in_a_set, by_settings)


def test_an_instance_leaves_no_trace_in_the_next(make_env, identical):
    env = make_env(instances="mixed", horizon=None, **TINY)
    bare = Instance(DIGITS, 1, 2, 0.5, horizon=3)

    before = rollout(env, bare)
    rollout(env, Instance(DIGITS, 5, 6, 2.0, **OWN))

    assert identical(rollout(env, bare), before)


@pytest.mark.parametrize("term", ["ewc", "si"])
def test_importances_do_not_depend_on_the_instance_that_came_first(make_env, identical, term):
    settings = {**TINY, "instances": "mixed", "horizon": None, "guidance": {"kl": 0.1, term: 1.0}}
    own = {"horizon": 2, "width": 0.5}  # a network that is built for the first such instance
    last = Instance(DIGITS, 1, 2, batch_size=16, **own)
    rollouts = []
    for first in (16, 64):
        env = make_env(**settings)
        env.reset(options={"instance": Instance(DIGITS, 3, 4, batch_size=first, **own)})
        rollouts.append(rollout(env, last))
    assert identical(*rollouts)


def test_snapshots_replay_across_instances(make_env, identical):
    env = make_env(instances="mixed", horizon=None, **TINY)
    own = Instance(DIGITS, 1, 2, 0.5, **OWN)
    env.reset(options={"instance": own})
    env.step([2] * 5)
    snapshot = env.snapshot()
    after = env.step([0] * 5)

    env.reset(options={"instance": Instance(DIGITS, 8, 9, horizon=3)})
    env.restore(snapshot)

    assert env.instance == own
    assert env.horizon == 2
    assert identical(env.step([0] * 5), after)


def test_networks_are_built_once_for_all_instances_that_share_them(make_env):
    env = make_env(instances="mixed", horizon=None, **TINY)
    trainers = set()
    for optimizer in ("sgd", "adam"):
        for batch_size in (16, 32):
            own = Instance(DIGITS, 1, 2, optimizer=optimizer, batch_size=batch_size, width=0.5)
            env.reset(options={"instance": own})
            trainers.add(id(env.trainer))

    assert len(trainers) == 1


def test_validation_images_are_those_of_the_instance(make_env):
    env = make_env(instances="transfer")
    env.reset(options={"instance": Instance(DIGITS, 1, 2)})
    assert env.images_per_measurement == 50
    assert len(env.trainer.splits["test"]) == 1500
    env.reset(options={"instance": Instance(DIGITS, 1, 2, target="scans")})
    assert len(env.trainer.splits["test"]) == 550


@pytest.mark.parametrize("instances", ["mixed", "transfer"])
def test_every_split_of_a_varied_set_keeps_the_spaces(make_env, instances):
    horizon = {"horizon": None} if instances == "mixed" else {}
    for split in ("train", "test"):
        env = make_env(instances=instances, split=split, **horizon, **TINY)
        shapes = set()
        for seed in range(4):
            observation, _ = env.reset(seed=seed)
            assert env.observation_space.contains(observation)
            shapes.add((observation.shape, env.trainer.layer_groups))
        assert len(shapes) == 1


def test_prepare_variants_loads_each_network_and_says_so():
    said = []

    prepare_variants(DIGITS, DigitsSettings(instances="transfer"), said.append)

    assert said == [f"network and images {n} of 5" for n in range(1, 6)]
    assert len(variants("transfer")) == 5
    said.clear()
    prepare_variants(DIGITS, DigitsSettings(), said.append)
    assert said == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, r"`optimizer` is set by each instance of mixed, got adam; leave"),
        ({"horizon": 5}, r"`horizon` is set by each instance of mixed, got 5; leave it out"),
        ({"width": 2.0}, r"`width` is set by each instance of mixed, got 2\.0; leave it out"),
        ({"momentum_form": "scaled-velocity"}, r"`momentum_form` must be pytorch with instances"),
        (
            {"inner_steps": "asg-intended", "steps_per_epoch": 20, "epochs": 2},
            r"`inner_steps` must be an integer with instances mixed, which vary the horizon",
        ),
    ],
)
def test_a_setting_that_instances_have_for_themselves_is_refused(make_env, values, message):
    with pytest.raises(ConfigError, match=message):
        make_env(**{"instances": "mixed", "horizon": None, **values})


def test_an_instance_of_a_task_without_its_setting_is_refused(make_env):
    env = make_env(inner_steps="asg-intended", steps_per_epoch=4, epochs=1, horizon=None)
    with pytest.raises(ValueError, match=r"`horizon` follows from steps_per_epoch"):
        env.reset(options={"instance": Instance(DIGITS, 1, 2, horizon=4)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": [1, 2, 3]}, r"`classes` must be five different digits of 0 to 9, got \[1, 2"),
        ({"classes": [1, 2, 3, 4, 10]}, r"`classes` must be five different digits of 0 to 9"),
        ({"classes": "56789"}, r"`classes` must be a list of five digits, such as \[0, 1, 2"),
        ({"width": 0}, r"`width` must be >= 0\.25, got 0"),
        ({"target": "usps"}, r"`target` must be one of 'mnist' or 'scans', got 'usps'"),
    ],
)
def test_values_of_the_digits_settings_are_checked(make_env, values, message):
    with pytest.raises(ConfigError, match=message):
        make_env(**values)


def test_classes_may_come_in_any_order(make_env):
    assert make_env(classes=[9, 5, 6, 8, 7]).settings.classes == (5, 6, 7, 8, 9)


def test_other_tasks_have_no_such_sets():
    from asg_env.task_settings import settings_class
    from asg_env.validation import validate

    with pytest.raises(ConfigError, match=r"`instances` must be fixed or unknown-scale on this"):
        validate(settings_class("ASG/DigitsImageNet-v0"), {"instances": "mixed"}, "env")


def test_train_instances_of_mixed_start_without_a_label_of_a_test_set():
    generator = np.random.default_rng(0)
    trained = {draw_instance(DIGITS, "mixed", generator).classes for _ in range(100)}
    assert not trained & {i.classes for i in published_test_instances(DIGITS, "mixed")}
