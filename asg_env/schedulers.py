"""What drives an optimizer by a learned schedule: in PyTorch, and for optax."""

import operator
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from asg_env.core.layer_groups import check_base_lr, effective_lrs, set_learning_rates
from asg_env.core.optimizers import MomentumForm, ScaledVelocitySGD, lr_factor
from asg_env.schedule import LearnedSchedule

# Class name of an optimizer to what `LearnedSchedule.optimizer` calls it.
CLASSES = {
    "SGD": "sgd",
    "ScaledVelocitySGD": "sgd",
    "Adam": "adam",
    "AdamW": "adamw",
    "SGDScheduleFree": "schedule-free",
    "Prodigy": "prodigy",
}
# Class name to why it takes no rate of its own for each group.
REFUSED = {
    "LBFGS": "it takes all parameters as one group",
    "Rprop": "it adapts a step length for every weight and reads the rate only once",
}
ONE_RATE = ("Prodigy", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "DAdaptAdaGrad")


class Course:
    """A schedule over a training of `total_steps` inner steps.

    Raises:
        ValueError: `total_steps` is not a positive integer.
    """

    def __init__(self, schedule: LearnedSchedule, total_steps: int) -> None:
        try:
            steps = 0 if isinstance(total_steps, bool) else operator.index(total_steps)
        except TypeError:
            steps = 0
        if steps < 1:
            raise ValueError(
                f"`total_steps` must be an integer >= 1, got {total_steps!r}; give the inner "
                "steps of the whole training"
            )
        self.schedule, self.total_steps = schedule, steps
        # Window starts in whole inner steps: exact, where comparing step / total_steps with a
        # rounded knot would not be.
        self.starts = tuple(round(knot * steps) for knot in schedule.knots)

    @property
    def squeezed(self) -> str:
        """A sentence where the training is shorter than the one learned from, else empty."""
        learned = self.schedule.inner_steps
        if self.total_steps >= learned:
            return ""
        return (
            f"the schedule was learned over {learned} inner steps and is squeezed into "
            f"{self.total_steps}; train longer where that is too fast"
        )

    def multipliers(self, step: int) -> tuple[float, ...]:
        """Multipliers of an inner step, the first is 0; shape (G,)."""
        return self.schedule.interpolated(self.starts, step)

    def factor(self, step: int) -> float:
        """Common warm-up and decay at an inner step, as at the same progress when learned.

        Beyond the end it stays, as the multipliers do.
        """
        step, learned = min(step, self.total_steps - 1), self.schedule.inner_steps
        return lr_factor(self.schedule.lr_factor, step * learned / self.total_steps, learned)

    def rates(
        self, step: int, base_lrs: Sequence[float | Tensor], owners: Sequence[int]
    ) -> list[float]:
        """Rate of each parameter group at an inner step, from its base rate and layer group."""
        multipliers = self.multipliers(step)
        factor = 1.0 if self.schedule.lr_factor == "constant" else self.factor(step)
        return [
            float(base_lr) * multipliers[owner] * factor
            for base_lr, owner in zip(base_lrs, owners, strict=True)
        ]

    def digest(self) -> int:
        """Number that tells this course from others."""
        of = self.schedule
        what = (self.total_steps, of.knots, of.multipliers, of.interpolation, of.lr_factor)
        return zlib.crc32(repr(what).encode())


class ScheduleLR(LRScheduler):
    """lr_g = initial_lr_g * multiplier_g(step / total_steps) * common factor.

    Its `state_dict` holds plain numbers only; the schedule itself is in its file.
    """

    def __init__(self, optimizer: Optimizer, schedule: LearnedSchedule, total_steps: int) -> None:
        self._course, self._owners = prepare(optimizer, schedule, total_steps)
        self.total_steps = self._course.total_steps
        self.schedule_digest = self._course.digest()
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Rates of the coming inner step, one per parameter group.

        Raises:
            ValueError: Groups were added to the optimizer.
        """
        check_groups(self.optimizer, len(self._owners))
        return self._course.rates(self.last_epoch, self.base_lrs, self._owners)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: where the schedule stands."""
        return {
            "last_epoch": self.last_epoch,
            "total_steps": self.total_steps,
            "schedule_digest": self.schedule_digest,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self.get_last_lr()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, at its rates; the optimizer's own state is loaded separately.

        Before or after: making a scheduler sets the rates of its first step, here they are set
        back to those of the step to come. Base rates are those of the state, as in PyTorch's own.

        Raises:
            ValueError: The state is of another scheduler or schedule, or of a training of another
                length.
        """
        mine = self.state_dict()
        if state_dict.keys() != mine.keys() or any(
            len(state_dict[name]) != len(mine[name]) for name in ("base_lrs", "_last_lr")
        ):
            raise ValueError(
                f"the state must hold {', '.join(mine)} for {len(self.base_lrs)} parameter groups; "
                "give one that this scheduler's state_dict made"
            )
        if state_dict["total_steps"] != self.total_steps:
            raise ValueError(
                f"`total_steps` must be {state_dict['total_steps']}, as when the state was saved, "
                f"got {self.total_steps}; make the scheduler with that"
            )
        if state_dict["schedule_digest"] != self.schedule_digest:
            raise ValueError(
                "the state must be of the same schedule, got that of another; make the scheduler "
                "from the file that it was saved with"
            )
        check_steps_done("last_epoch", state_dict["last_epoch"])
        self.__dict__.update(state_dict)
        set_learning_rates(self.optimizer, [float(lr) for lr in self._last_lr])


def check_groups(optimizer: Optimizer, count: int) -> None:
    """Find out whether an optimizer still has the parameter groups that a scheduler drives.

    Raises:
        ValueError: Groups were added.
    """
    if len(optimizer.param_groups) != count:
        raise ValueError(
            f"the optimizer must have {count} parameter groups, as when the scheduler was made, "
            f"got {len(optimizer.param_groups)}; add groups before it is made"
        )


def check_steps_done(name: str, value: Any) -> None:
    """Find out whether a state's count of inner steps is one.

    Raises:
        ValueError: It is not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value >= 0 and float(value).is_integer())
    ):
        raise ValueError(
            f"`{name}` must be the inner steps done, an integer >= 0, got {value!r}; give a state "
            "that this scheduler's state_dict made"
        )


def prepare(
    optimizer: Optimizer, schedule: LearnedSchedule, total_steps: int
) -> tuple[Course, list[int]]:
    """Check that a schedule can drive an optimizer.

    Returns:
        The course of the training, and for each parameter group the index of its layer group.

    Raises:
        ValueError: See `LearnedSchedule.to_torch`.
    """
    course = Course(schedule, total_steps)
    rows = schedule.multipliers
    alike = schedule.interpolation == "step" and all(len({m for m in row if m}) < 2 for row in rows)
    check_optimizer(optimizer, schedule.momentum_form, uniform=alike)
    names = layer_group_names(optimizer)
    wanted = list(schedule.layer_groups)
    owners, layers = runs_of(names)
    if layers != wanted:
        raise ValueError(
            f"the optimizer's groups must be {wanted}, in this order, got {names}; build it on "
            "schedule.param_groups(model)"
        )
    name = type(unwrapped(optimizer)).__name__
    base_lrs = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
    if CLASSES.get(name) != schedule.optimizer and schedule.base_lr in base_lrs:
        warnings.warn(
            f"the schedule's base rate {schedule.base_lr:g} was learned with {schedule.optimizer} "
            f"and is used with {name}; give param_groups a base_lr that suits it",
            stacklevel=4,
        )
    if course.squeezed:
        warnings.warn(course.squeezed, stacklevel=4)
    return course, owners


def layer_group_names(optimizer: Optimizer) -> list[Any]:
    """Name of each parameter group's layer group, None where it has no name."""
    return [group.get("layer_group", group.get("name")) for group in optimizer.param_groups]


def runs_of(names: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Number of each parameter group's layer group, and these: equal neighbours are one."""
    owners: list[int] = []
    layers: list[Any] = []
    for name in names:
        if not layers or layers[-1] != name:
            layers.append(name)
        owners.append(len(layers) - 1)
    return owners, layers


def check_optimizer(
    optimizer: Optimizer, momentum_form: MomentumForm, *, uniform: bool = False
) -> None:
    """Find out whether an optimizer can take learned rates.

    Args:
        optimizer: Perhaps wrapped, see `unwrapped`.
        momentum_form: Of what the rates were learned with.
        uniform: All groups always have the same rate, or 0.

    Raises:
        ValueError: It cannot take a rate for each group, groups share one, or it has another form
            of momentum.
    """
    inner = unwrapped(optimizer)
    name = type(inner).__name__
    reason = REFUSED.get(name)
    if name in ONE_RATE and not uniform:
        reason = "it estimates one step length for all groups"
    elif any(group.get("relative_step") for group in inner.param_groups):
        reason = "relative_step makes it set its own rate; with relative_step=False it can"
    if reason:
        raise ValueError(
            f"optimizer {name} cannot take a rate for each layer group, because {reason}; use SGD "
            "or AdamW"
        )
    tensors = [id(g["lr"]) for g in inner.param_groups if isinstance(g["lr"], Tensor)]
    if len(set(tensors)) < len(tensors):
        raise ValueError(
            "parameter groups must each have a learning rate of their own, got one tensor as the "
            "`lr` of several; give each group a tensor of its own, or numbers"
        )
    if isinstance(inner, ScaledVelocitySGD) != (momentum_form == "scaled-velocity"):
        raise ValueError(
            f"the rates were learned with momentum_form '{momentum_form}', got {name}; use an "
            "optimizer of that form"
        )


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a wrapper, such as Accelerate's, holds under `optimizer`."""
    held = getattr(optimizer, "optimizer", None)
    return unwrapped(held) if isinstance(held, Optimizer) else optimizer


def optax_schedules(
    schedule: LearnedSchedule, total_steps: int, base_lr: float
) -> dict[str, Callable[[Any], Any]]:
    """See `LearnedSchedule.to_optax`."""
    try:
        import jax.numpy as jnp
    except ImportError:
        raise ImportError("to_optax needs JAX; pip install jax optax") from None
    base_lr = check_base_lr(base_lr)
    if schedule.momentum_form != "pytorch":
        raise ValueError(
            f"the rates were learned with momentum_form '{schedule.momentum_form}', which optax "
            "does not have; use a schedule of momentum_form 'pytorch'"
        )
    course = Course(schedule, total_steps)
    if course.squeezed:
        warnings.warn(course.squeezed, stacklevel=3)
    rates = [
        effective_lrs(base_lr, course.multipliers(step), course.factor(step))
        for step in range(total_steps)
    ]

    def looked_up(of_group: tuple[float, ...]) -> Callable[[Any], Any]:
        table = jnp.asarray(of_group)
        return lambda step: table[jnp.minimum(step, total_steps - 1)]

    columns = zip(*rates, strict=True)
    return dict(zip(schedule.layer_groups, map(looked_up, columns), strict=True))
