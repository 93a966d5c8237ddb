import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest

from asg_env.instances import (
    MIXED_CLASSES,
    SCALE_RANGE,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Instance,
    draw_instance,
    kind_of,
    published_test_instances,
    variants,
)

TASK = "ASG/Digits-v0"
SETS = ("fixed", "unknown-scale", "mixed", "transfer")
MIXED_FIRST = {
    "task": TASK, "head_seed": 2829426575, "data_seed": 3680428738,
    "base_lr_scale": 0.15794878359613954, "optimizer": "adam", "batch_size": 32, "horizon": 10,
    "classes": [0, 3, 4, 6, 9], "width": 0.5,
}  # fmt: skip
TRANSFER_FIRST = {
    "task": TASK, "head_seed": 3210568005, "data_seed": 3914577496,
    "base_lr_scale": 0.4953359222340498, "optimizer": "adam",
}  # fmt: skip
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


def test_published_test_instances_of_the_varied_sets_never_change():
    assert published_test_instances(TASK, "mixed")[0].to_dict() == MIXED_FIRST
    assert published_test_instances(TASK, "transfer")[0].to_dict() == TRANSFER_FIRST


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


def counts(listed, name):
    return dict(Counter(getattr(one, name) for one in listed))


def test_mixed_test_instances_are_balanced_over_digits_that_nobody_trained_on():
    listed = published_test_instances(TASK, "mixed")

    assert counts(listed, "optimizer") == {"sgd": 20, "adam": 20}
    assert counts(listed, "classes") == dict.fromkeys(MIXED_CLASSES["test"], 20)
    assert counts(listed, "batch_size") == {16: 14, 32: 13, 64: 13}
    assert counts(listed, "horizon") == {10: 14, 15: 13, 20: 13}
    assert counts(listed, "width") == {0.5: 14, 1.0: 13, 1.5: 13}
    trained = drawn("mixed", 300)
    assert set(counts(trained, "classes")) == set(MIXED_CLASSES["train"])
    assert not set(MIXED_CLASSES["train"]) & set(MIXED_CLASSES["test"])
    assert {len(counts(trained, n)) for n in ("batch_size", "horizon", "width")} == {3}


def test_transfer_trains_as_unknown_scale_and_tests_four_other_kinds():
    assert drawn("transfer", 20) == drawn("unknown-scale", 20)
    listed = published_test_instances(TASK, "transfer")

    kinds = {}
    for one in listed:
        kinds.setdefault(kind_of(one), []).append(math.log10(one.base_lr_scale))
    assert sorted(kinds) == ["classes 01234", "optimizer adam", "target scans", "width 2.0"]
    for logs in kinds.values():  # a scale in every tenth of the range
        assert [math.floor((log + 1) / 2 * 10) for log in sorted(logs)] == list(range(10))


def test_variants_are_the_networks_and_images_that_instances_need():
    for instances in SETS:
        known = [
            {n: v for n, v in change.items() if n != "optimizer"} for change in variants(instances)
        ]
        listed = [*drawn(instances, 50), *published_test_instances(TASK, instances)]
        for one in listed:
            own = {n: v for n, v in one.changes().items() if n in ("classes", "width", "target")}
            assert own in known


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
        ({"depth": 3}, r"an instance has the keys .*, got .*depth"),
        ({"head_seed": 1.5}, r"`head_seed` must be an integer, got 1\.5"),
        ({"head_seed": True}, r"`head_seed` must be an integer, got True"),
        ({"data_seed": "2"}, r"`data_seed` must be an integer, got '2'"),
        (
            {"base_lr_scale": 0},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got 0",
        ),
        (
            {"base_lr_scale": -1.0},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got -1\.0",
        ),
        (
            {"base_lr_scale": math.nan},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got nan",
        ),
        (
            {"base_lr_scale": math.inf},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got inf",
        ),
        (
            {"base_lr_scale": "big"},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got 'big'",
        ),
        ({"width": 0}, r"`width` must be a finite number > 0, at most 100, got 0"),
        ({"horizon": 0}, r"`horizon` must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, r"`batch_size` must be an integer >= 1, got 2\.5"),
        ({"optimizer": "sdg"}, r"`optimizer` must be one of sgd, adam, .*, got 'sdg'"),
        ({"target": "usps"}, r"`target` must be one of mnist, scans, got 'usps'"),
        ({"classes": [1, 2]}, r"`classes` must be five different digits of 0 to 9, got \[1, 2\]"),
        ({"classes": "01234"}, r"`classes` must be a list of five digits, .*, got '01234'"),
        (
            {"base_lr_scale": True},
            r"`base_lr_scale` must be a finite number > 0, at most 10000, got True",
        ),
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
