"""Instances: the training problems that episodes are drawn from, in sets with a test list each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from asg_env.core.layer_groups import LARGEST_SCALE
from asg_env.core.optimizers import OptimizerName
from asg_env.core.seeding import numpy_generator
from asg_env.tasks.digit_sets import TARGETS, TargetName, five_digits

InstanceSet = Literal["fixed", "unknown-scale", "mixed", "transfer"]
InstanceSplit = Literal["train", "test"]

TEST_INSTANCES = 40
LARGEST_WIDTH = 100.0  # a typing mistake must not ask for all memory
SCALE_RANGE = (0.1, 10.0)  # of `base_lr_scale` in every set but `fixed`
# Train and test instances are disjoint by construction: their seeds come from disjoint ranges.
TRAIN_SEEDS = (0, 2**31)
TEST_SEEDS = (2**31, 2**32)

# Settings that instances of a set have for themselves; the environment's own must be the default.
VARIED: dict[InstanceSet, tuple[str, ...]] = {
    "fixed": (),
    "unknown-scale": (),
    "mixed": ("optimizer", "batch_size", "horizon", "classes", "width"),
    "transfer": ("optimizer", "classes", "width", "target"),
}
MIXED_OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adam")
MIXED_BATCH_SIZES = (16, 32, 64)
MIXED_HORIZONS = (10, 15, 20)  # env steps
MIXED_WIDTHS = (0.5, 1.0, 1.5)
# Digits that are new to the network; the other five are the old task. None of the test list's sets
# is among those that are trained on.
MIXED_CLASSES: dict[InstanceSplit, tuple[tuple[int, ...], ...]] = {
    "train": ((5, 6, 7, 8, 9), (1, 3, 5, 7, 9), (0, 2, 5, 6, 8), (1, 2, 4, 7, 8)),
    "test": ((0, 3, 4, 6, 9), (2, 3, 5, 8, 9)),
}
# What a test instance of `transfer` has that no train instance has: a quarter of the list each.
TRANSFER_KINDS: tuple[dict[str, Any], ...] = (
    {"width": 2.0},
    {"optimizer": "adam"},
    {"classes": (0, 1, 2, 3, 4)},
    {"target": "scans"},
)


@dataclass(frozen=True)
class Instance:
    """One training problem: all that its trajectory depends on besides the settings.

    Attributes:
        task: Environment id.
        head_seed: Seed of the new head's initial weights.
        data_seed: Seed of the order of training images.
        base_lr_scale: Hidden factor on the base learning rate, dimensionless, > 0.
        optimizer: In the place of the setting of this name, as all that follow; None: as set.
        batch_size: Images.
        horizon: Env steps.
        classes: The five digits of the new task.
        width: Factor on the network's channels.
        target: Where the real images come from.
    """

    task: str
    head_seed: int
    data_seed: int
    base_lr_scale: float = 1.0
    optimizer: OptimizerName | None = None
    batch_size: int | None = None
    horizon: int | None = None
    classes: tuple[int, ...] | None = None
    width: float | None = None
    target: TargetName | None = None

    def changes(self) -> dict[str, Any]:
        """Return the settings that this instance has for itself, by name."""
        own = {name: getattr(self, name) for name in OWN_SETTINGS}
        return {name: value for name, value in own.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        changes = self.changes()
        if self.classes is not None:
            changes["classes"] = list(self.classes)
        return {**{name: getattr(self, name) for name in COMMON}, **changes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Instance":
        """Read an instance back.

        Raises:
            ValueError: A key is missing or unknown, or a value has the wrong type or range.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"an instance must be a mapping, got {values!r}")
        if set(values) - set(known) or not {"task", "head_seed", "data_seed"} <= set(values):
            raise ValueError(f"an instance has the keys {sorted(known)}, got {list(values)}")
        for name in ("head_seed", "data_seed"):
            if not _is_whole(values[name]):
                raise ValueError(f"instance `{name}` must be an integer, got {values[name]!r}")
        for name, largest in (("base_lr_scale", LARGEST_SCALE), ("width", LARGEST_WIDTH)):
            number = values.get(name, 1.0)
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not 0 < number <= largest
            ):
                raise ValueError(
                    f"instance `{name}` must be a finite number > 0, at most {largest:g}, "
                    f"got {number!r}"
                )
        for name in ("batch_size", "horizon"):
            if not _is_whole(values.get(name, 1)) or values.get(name, 1) < 1:
                raise ValueError(f"instance `{name}` must be an integer >= 1, got {values[name]!r}")
        for name, names in (("optimizer", get_args(OptimizerName)), ("target", TARGETS)):
            if values.get(name, names[0]) not in names:
                raise ValueError(
                    f"instance `{name}` must be one of {', '.join(names)}, got {values[name]!r}"
                )
        if "classes" in values:
            try:
                values = {**values, "classes": five_digits(values["classes"])}
            except ValueError as error:
                raise ValueError(f"instance `classes` {error}") from None
        return cls(**values)


COMMON = ("task", "head_seed", "data_seed", "base_lr_scale")  # that every instance has
OWN_SETTINGS = tuple(field.name for field in fields(Instance) if field.name not in COMMON)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def draw_instance(task: str, instances: InstanceSet, generator: np.random.Generator) -> Instance:
    """Draw a train instance of the set.

    `transfer` is trained on the instances of `unknown-scale`: its own are for testing.
    """
    head_seed, data_seed = generator.integers(*TRAIN_SEEDS, size=2).tolist()
    if instances == "fixed":
        return Instance(task, head_seed, data_seed)
    low, high = np.log(SCALE_RANGE)
    scale = float(np.exp(generator.uniform(low, high)))
    if instances != "mixed":
        return Instance(task, head_seed, data_seed, scale)
    return Instance(
        task,
        head_seed,
        data_seed,
        scale,
        optimizer=_one_of(MIXED_OPTIMIZERS, generator),
        batch_size=_one_of(MIXED_BATCH_SIZES, generator),
        horizon=_one_of(MIXED_HORIZONS, generator),
        classes=_one_of(MIXED_CLASSES["train"], generator),
        width=_one_of(MIXED_WIDTHS, generator),
    )


def published_test_instances(task: str, instances: InstanceSet) -> tuple[Instance, ...]:
    """Return the fixed list of test instances of the set, 40 of them.

    Hidden scales are stratified, one in each fortieth of the log range (in each tenth for each
    kind of `transfer`), and what else varies is balanced, so that a mean over the list has less
    variance than one over independent draws.
    """
    generator = numpy_generator(0, "published-test-instances", task, instances)
    strata = generator.permutation(TEST_INSTANCES)
    low, high = np.log(SCALE_RANGE)
    listed = []
    for stratum in strata:
        head_seed, data_seed = generator.integers(*TEST_SEEDS, size=2).tolist()
        position = (stratum + generator.uniform()) / TEST_INSTANCES
        scale = float(np.exp(low + (high - low) * position)) if instances != "fixed" else 1.0
        listed.append((head_seed, data_seed, scale, int(stratum)))
    if instances == "mixed":
        own = _mixed_tests(generator)
    elif instances == "transfer":
        # By stratum, so that each kind has a scale in every tenth of the range.
        own = [TRANSFER_KINDS[stratum % len(TRANSFER_KINDS)] for *_, stratum in listed]
    else:
        own = [{}] * TEST_INSTANCES
    return tuple(
        Instance(task, *drawn, **changes) for (*drawn, _), changes in zip(listed, own, strict=True)
    )


def variants(instances: InstanceSet) -> list[dict[str, Any]]:
    """Return every network that instances of a set train, as changes of an instance."""
    if instances == "mixed":
        every = [*MIXED_CLASSES["train"], *MIXED_CLASSES["test"]]
        return [{"classes": five, "width": width} for five in every for width in MIXED_WIDTHS]
    return [{}, *(TRANSFER_KINDS if instances == "transfer" else ())]


def kind_of(instance: Instance) -> str:
    """Return in words how a test instance of `transfer` differs from the train instances."""
    return ", ".join(
        f"{name} {''.join(map(str, value)) if name == 'classes' else value}"
        for name, value in instance.changes().items()
    )


def _mixed_tests(generator: np.random.Generator) -> list[dict[str, Any]]:
    """What varies in the test list of `mixed`: every value as often as any other."""
    columns: dict[str, Sequence[Any]] = {
        "optimizer": MIXED_OPTIMIZERS,
        "batch_size": MIXED_BATCH_SIZES,
        "horizon": MIXED_HORIZONS,
        "classes": MIXED_CLASSES["test"],
        "width": MIXED_WIDTHS,
    }
    rows: list[dict[str, Any]] = [{} for _ in range(TEST_INSTANCES)]
    for name, values in columns.items():
        for place, row in zip(generator.permutation(TEST_INSTANCES), rows, strict=True):
            row[name] = values[int(place) % len(values)]
    return rows


T = TypeVar("T")


def _one_of(values: Sequence[T], generator: np.random.Generator) -> T:
    return values[int(generator.integers(len(values)))]
