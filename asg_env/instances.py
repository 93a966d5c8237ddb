"""Instances: the training problems that episodes are drawn from."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from asg_env.core.seeding import numpy_generator

InstanceSet = Literal["fixed", "unknown-scale"]
InstanceSplit = Literal["train", "test"]

TEST_INSTANCES = 40
SCALE_RANGE = (0.1, 10.0)  # of `base_lr_scale` in the set `unknown-scale`
# Train and test instances are disjoint by construction: their seeds come from disjoint ranges.
TRAIN_SEEDS = (0, 2**31)
TEST_SEEDS = (2**31, 2**32)


@dataclass(frozen=True)
class Instance:
    """One training problem: all that its trajectory depends on besides the settings.

    Attributes:
        task: Environment id.
        head_seed: Seed of the new head's initial weights.
        data_seed: Seed of the order of training images.
        base_lr_scale: Hidden factor on the base learning rate, dimensionless, > 0.
    """

    task: str
    head_seed: int
    data_seed: int
    base_lr_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Instance":
        """Read an instance back.

        Raises:
            ValueError: A key is missing or unknown, or a value has the wrong type or range.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise ValueError(f"an instance must be a mapping, got {values!r}")
        if set(values) - known or not {"task", "head_seed", "data_seed"} <= set(values):
            raise ValueError(f"an instance has the keys {sorted(known)}, got {list(values)}")
        instance = cls(**values)
        for name in ("head_seed", "data_seed"):
            value = getattr(instance, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"instance `{name}` must be an integer, got {value!r}")
        scale = instance.base_lr_scale
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not (math.isfinite(scale) and scale > 0)
        ):
            raise ValueError(f"instance `base_lr_scale` must be a finite number > 0, got {scale!r}")
        return instance


def draw_instance(task: str, instances: InstanceSet, generator: np.random.Generator) -> Instance:
    """Draw a train instance of the set."""
    head_seed, data_seed = generator.integers(*TRAIN_SEEDS, size=2).tolist()
    scale = 1.0
    if instances == "unknown-scale":
        low, high = np.log(SCALE_RANGE)
        scale = float(np.exp(generator.uniform(low, high)))
    return Instance(task, head_seed, data_seed, scale)


def published_test_instances(task: str, instances: InstanceSet) -> tuple[Instance, ...]:
    """Return the fixed list of test instances of the set, 40 of them.

    The scales of `unknown-scale` are stratified: one in each fortieth of the log range, so that
    a mean over the list has less variance than one over independent draws.
    """
    generator = numpy_generator(0, "published-test-instances", task, instances)
    strata = generator.permutation(TEST_INSTANCES)
    low, high = np.log(SCALE_RANGE)
    listed = []
    for stratum in strata:
        head_seed, data_seed = generator.integers(*TEST_SEEDS, size=2).tolist()
        position = (stratum + generator.uniform()) / TEST_INSTANCES
        scale = float(np.exp(low + (high - low) * position)) if instances != "fixed" else 1.0
        listed.append(Instance(task, head_seed, data_seed, scale))
    return tuple(listed)
