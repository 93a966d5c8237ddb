"""A learned schedule as a timm scheduler; imported where timm is."""

from typing import Any

from torch.optim import Optimizer

from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import prepare

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

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers; how far the training is comes with `step_update`."""
        return {"total_steps": self._course.total_steps, "base_values": list(self.base_values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the base rates of a `state_dict`.

        Raises:
            ValueError: It is of a training of another length, or of other parameter groups.
        """
        total, base = state_dict.get("total_steps"), state_dict.get("base_values", ())
        if total != self._course.total_steps or len(base) != len(self._owners):
            raise ValueError(
                f"the state must be of {self._course.total_steps} inner steps and "
                f"{len(self._owners)} parameter groups, got {total} and {len(base)}; make the "
                "scheduler as when it was saved"
            )
        self.base_values = list(base)

    def _get_lr(self, t: int) -> list[float]:
        multipliers, factor = self._course.multipliers(t), self._course.factor(t)
        return [
            base * multipliers[owner] * factor
            for base, owner in zip(self.base_values, self._owners, strict=True)
        ]
