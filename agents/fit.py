"""Ordinary training, outside the environment, with a schedule, a controller or a baseline.

No real label is read: a live controller decides from training losses alone (and the synthetic
inner_valid split, if its observation has it).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from agents.live import LivePolicy
from agents.policy import Policy
from asg_env.actions import ACTIONS
from asg_env.config import EnvSettings
from asg_env.core.telemetry import Telemetry
from asg_env.core.trainer import Trainer
from asg_env.env import RESET_BATCHES
from asg_env.instances import Instance
from asg_env.observations import Observation
from asg_env.schedulers import Course


class ScheduleController:
    """Reads the multipliers of a window off a schedule.

    Attributes:
        windows: Inner steps of the windows in which its multipliers stay.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        total, starts = course.total_steps, sorted(set(course.starts))
        if course.schedule.interpolation != "step":
            starts = list(range(total))
        self.windows = tuple(b - a for a, b in pairwise((*starts, total)) if b > a)

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Nothing to prepare."""

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the schedule's values at the inner step of this progress."""
        return self._course.multipliers(round(progress * self._course.total_steps))


class LiveController:
    """A trained policy that watches a training and sets its multipliers, window by window."""

    def __init__(
        self, policy: Policy, settings: EnvSettings, trainer: Trainer, deterministic: bool
    ) -> None:
        self._trainer, groups = trainer, trainer.layer_groups
        self._live = LivePolicy(
            policy,
            Observation(settings.observation, groups, settings.grid, trainer.guidance.extra),
            ACTIONS[settings.action](settings.grid, len(groups)),
            (settings.start_multiplier,) * len(groups),
            deterministic,
        )
        self._first_window = settings.windows()[0]

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Look at the first batches before any step is taken, as the environment's reset does."""
        self._initial = self._trainer.initial_report(min(RESET_BATCHES, self._first_window))
        self._live.begin(self._initial)

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Encode the last window as the environment does, and ask the policy."""
        loss = 0.0
        if self._live.needs_inner_valid:
            loss = self._trainer.evaluate("inner_valid").loss
        return self._live.decide(
            telemetry or self._initial, progress, loss, self._trainer.chance_loss
        )


def fit(
    trainer: Trainer,
    controller: Any,
    instance: Instance,
    windows: Sequence[int],
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Train once, window by window; stop early if the training diverges.

    Args:
        trainer: The network and its data; trained in place.
        controller: A `Controller`, such as those above or `agents.baselines`.
        instance: Head, data order and rate scale.
        windows: Inner steps of each window.
        report: Called with the record of each window.

    Returns:
        One record per window: inner step, multipliers, CE, KL, values of further guidance terms,
        drift of each layer group, whether it diverged.
    """
    trainer.reset(instance.head_seed, instance.data_seed, instance.base_lr_scale)
    controller.begin(instance, trainer)
    telemetry: Telemetry | None = None
    records = []
    for length in windows:
        progress = trainer.inner_step / sum(windows)
        multipliers = [float(m) for m in controller.multipliers(progress, telemetry)]
        telemetry = trainer.run(length, multipliers)
        records.append(
            {
                "inner_step": trainer.inner_step,
                "lr_multipliers": multipliers,
                "ce": telemetry.ce,
                "kl": telemetry.kl,
                "guidance": dict(telemetry.guidance),
                "drifts": telemetry.drifts,
                "diverged": telemetry.diverged,
            }
        )
        report(records[-1])
        if telemetry.diverged:
            break
    return records
