"""A learned schedule as a timm scheduler; imported where timm is."""

from typing import Any

from torch.optim import Optimizer

from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import check_groups, check_steps_done, prepare

try:
    from timm.scheduler.scheduler import Scheduler
except ImportError:
    raise ImportError("to_timm needs timm; pip install 'asg-env[timm]'") from None


class TimmScheduleLR(Scheduler):
    """Sets the rates in `step_update(n)`, where n inner steps are done; `step(epoch)` does nothing.

    timm multiplies by a parameter group's `lr_scale` where there is one.
    """

    def __init__(self, optimizer: Optimizer, schedule: LearnedSchedule, total_steps: int) -> None:
        self._course, self._owners = prepare(optimizer, schedule, total_steps)
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.step_update(0)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set the rates of the step that comes after `num_updates` steps."""
        self._done = int(num_updates)  # plain, for the state
        super().step_update(num_updates, metric)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: where the schedule stands."""
        return {
            "total_steps": self._course.total_steps,
            "schedule_digest": self._course.digest(),
            "base_values": [float(value) for value in self.base_values],
            "num_updates": self._done,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, at its rates.

        Raises:
            ValueError: It is of a training of another length, of another schedule, or of other
                parameter groups.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"the state must hold {', '.join(self.state_dict())}, got {', '.join(state_dict)}; "
                "give one that this scheduler's state_dict made"
            )
        total, base = state_dict["total_steps"], state_dict["base_values"]
        if total != self._course.total_steps or len(base) != len(self._owners):
            raise ValueError(
                f"the state must be of {self._course.total_steps} inner steps and "
                f"{len(self._owners)} parameter groups, got {total} and {len(base)}; make the "
                "scheduler as when it was saved"
            )
        if state_dict["schedule_digest"] != self._course.digest():
            raise ValueError(
                "the state must be of the same schedule, got that of another; make the scheduler "
                "from the file that it was saved with"
            )
        check_steps_done("num_updates", state_dict["num_updates"])
        self.base_values = list(base)
        self.step_update(state_dict["num_updates"])

    def _get_lr(self, t: int) -> list[float]:
        check_groups(self.optimizer, len(self._owners))
        return self._course.rates(t, self.base_values, self._owners)
