"""A schedule as a table, and as a snippet of Python that needs nothing from here."""

import csv
import io

from asg_env.core.optimizers import LRFactor, MomentumForm
from asg_env.schedule import Interpolation, LearnedSchedule
from asg_env.schedulers import Course
from asg_env.validation import ConfigError

SNIPPET = '''\
"""Learned on {task} with {optimizer} at {base_lr:g}; {selection} of {episodes} rollouts."""

from bisect import bisect_right

from torch.optim.lr_scheduler import LambdaLR

KNOTS = {knots}  # progress at which each multiplier begins to hold
MULTIPLIERS = {{  # layer group, as the optimizer's parameter groups are named: one for each knot
{rows}
}}


def learned_schedule(optimizer, total_steps):
    """Return a scheduler; call its `.step()` after every `optimizer.step()`."""
    starts = [round(knot * total_steps) for knot in KNOTS]
    names = [group.get("layer_group", group.get("name")) for group in optimizer.param_groups]
    rows = [MULTIPLIERS[name] for name in names]
    held = [lambda step, row=row: row[bisect_right(starts, step) - 1] for row in rows]
    return LambdaLR(optimizer, held)
'''


def to_csv(schedule: LearnedSchedule) -> str:
    """Return a line for each inner step: step, progress, multipliers, then rates by group."""
    course = Course(schedule, schedule.inner_steps)
    names = list(schedule.layer_groups)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["inner_step", "progress", *(f"multiplier/{n}" for n in names), *(f"lr/{n}" for n in names)]
    )
    for step in range(schedule.inner_steps):
        multipliers = course.multipliers(step)
        factor = course.factor(step)
        rates = [schedule.base_lr * multiplier * factor for multiplier in multipliers]
        writer.writerow([step, step / schedule.inner_steps, *multipliers, *rates])
    return text.getvalue()


def check_python(
    interpolation: Interpolation, lr_factor: LRFactor, momentum_form: MomentumForm
) -> None:
    """Find out whether a schedule fits into a snippet of Python.

    Raises:
        ConfigError: It has a common warm-up or decay, or rates that change between knots, which
            ten lines do not hold; or it was learned with another momentum than PyTorch's.
    """
    if (interpolation, lr_factor, momentum_form) != ("step", "constant", "pytorch"):
        raise ConfigError(
            "--format python needs --interpolation step and a run with `lr_factor` constant and "
            f"`momentum_form` pytorch, got {interpolation}, {lr_factor} and {momentum_form}; "
            "export json and use to_torch"
        )


def to_python(schedule: LearnedSchedule) -> str:
    """Return a LambdaLR of PyTorch with the numbers in it.

    Raises:
        ConfigError: As `check_python`.
    """
    check_python(schedule.interpolation, schedule.lr_factor, schedule.momentum_form)
    columns = zip(*schedule.multipliers, strict=True)
    rows = [
        f"    # parameters that match {pattern!r}\n    {name!r}: {column},"
        for (name, pattern), column in zip(schedule.layer_groups.items(), columns, strict=True)
    ]
    return SNIPPET.format(rows="\n".join(rows), **dict(schedule))
