import dataclasses
import json
import math

import numpy as np
import pytest

from asg_env.instances import (
    SCALE_RANGE,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Instance,
    draw_instance,
    published_test_instances,
)

TASK = "ASG/Digits-v0"
SETS = ("fixed", "unknown-scale")
VALUES = {"task": TASK, "head_seed": 1, "data_seed": 2, "base_lr_scale": 0.5}


def drawn(instances, count):
    generator = np.random.default_rng(0)
    return [draw_instance(TASK, instances, generator) for _ in range(count)]


def seeds(listed):
    return {seed for one in listed for seed in (one.head_seed, one.data_seed)}


def test_seed_ranges_of_train_and_test_do_not_overlap():
    assert TRAIN_SEEDS[1] <= TEST_SEEDS[0]


@pytest.mark.parametrize("instances", SETS)
def test_train_and_test_instances_come_from_their_ranges(instances):
    train, test = drawn(instances, 100), published_test_instances(TASK, instances)

    assert all(TRAIN_SEEDS[0] <= seed < TRAIN_SEEDS[1] for seed in seeds(train))
    assert all(TEST_SEEDS[0] <= seed < TEST_SEEDS[1] for seed in seeds(test))
    assert not seeds(train) & seeds(test)


@pytest.mark.parametrize("instances", SETS)
def test_published_test_instances_are_forty_different_ones(instances):
    listed = published_test_instances(TASK, instances)

    assert len(set(listed)) == 40
    assert len(seeds(listed)) == 80
    assert listed == published_test_instances(TASK, instances)


def test_published_test_instances_never_change():
    # Results of others were made with these: a new list needs a new environment id.
    assert published_test_instances(TASK, "fixed")[0] == Instance(TASK, 3726132985, 3215288433, 1.0)
    first = published_test_instances(TASK, "unknown-scale")[0]
    assert (first.head_seed, first.data_seed) == (3573886127, 3064107762)
    assert first.base_lr_scale == pytest.approx(0.10689273846932039, rel=1e-12)


def test_published_test_instances_depend_on_the_task():
    others = published_test_instances("ASG/Other-v0", "fixed")

    assert not seeds(others) & seeds(published_test_instances(TASK, "fixed"))


def test_published_scales_lie_one_in_each_fortieth_of_the_log_range():
    listed = published_test_instances(TASK, "unknown-scale")
    positions = sorted((math.log10(one.base_lr_scale) + 1) / 2 * 40 for one in listed)

    assert [math.floor(position) for position in positions] == list(range(40))


def test_fixed_instances_have_the_nominal_rate():
    listed = [*drawn("fixed", 20), *published_test_instances(TASK, "fixed")]

    assert {one.base_lr_scale for one in listed} == {1.0}


def test_unknown_scales_are_log_uniform():
    scales = np.array([one.base_lr_scale for one in drawn("unknown-scale", 2000)])
    positions = np.sort((np.log10(scales) + 1) / 2)

    assert SCALE_RANGE == (0.1, 10.0)
    assert scales.min() >= 0.1
    assert scales.max() <= 10.0
    # Kolmogorov-Smirnov distance from the uniform distribution; 1.63 / sqrt(n) is its 1 % bound.
    assert np.abs(positions - (np.arange(2000) + 0.5) / 2000).max() < 1.63 / math.sqrt(2000)


def test_draw_instance_repeats_from_the_same_generator():
    assert drawn("unknown-scale", 5) == drawn("unknown-scale", 5)
    assert len(set(drawn("unknown-scale", 5))) == 5


@pytest.mark.parametrize("instances", SETS)
def test_instance_survives_json(instances):
    for instance in drawn(instances, 5):
        assert Instance.from_dict(json.loads(json.dumps(instance.to_dict()))) == instance


def test_instance_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Instance(**VALUES).head_seed = 3


def test_instance_scale_defaults_to_nominal():
    values = {key: value for key, value in VALUES.items() if key != "base_lr_scale"}

    assert Instance.from_dict(values).base_lr_scale == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 3}, r"an instance has the keys .*, got .*width"),
        ({"head_seed": 1.5}, r"`head_seed` must be an integer, got 1\.5"),
        ({"head_seed": True}, r"`head_seed` must be an integer, got True"),
        ({"data_seed": "2"}, r"`data_seed` must be an integer, got '2'"),
        ({"base_lr_scale": 0}, r"`base_lr_scale` must be a finite number > 0, got 0"),
        ({"base_lr_scale": -1.0}, r"`base_lr_scale` must be a finite number > 0, got -1\.0"),
        ({"base_lr_scale": math.nan}, r"`base_lr_scale` must be a finite number > 0, got nan"),
        ({"base_lr_scale": math.inf}, r"`base_lr_scale` must be a finite number > 0, got inf"),
        ({"base_lr_scale": "big"}, r"`base_lr_scale` must be a finite number > 0, got 'big'"),
        ({"base_lr_scale": True}, r"`base_lr_scale` must be a finite number > 0, got True"),
    ],
)
def test_instance_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Instance.from_dict(VALUES | values)


@pytest.mark.parametrize("key", ["task", "head_seed", "data_seed"])
def test_instance_from_dict_refuses_a_missing_key(key):
    values = {name: value for name, value in VALUES.items() if name != key}

    with pytest.raises(ValueError, match=r"an instance has the keys .*, got"):
        Instance.from_dict(values)


@pytest.mark.parametrize("values", [5, None, "text", [1, 2]])
def test_instance_from_dict_refuses_what_is_no_mapping(values):
    with pytest.raises(ValueError, match="an instance "):
        Instance.from_dict(values)
