"""`LearnedSchedule`: learned multipliers as a file, reused in ordinary PyTorch training.

Example:
    schedule = LearnedSchedule.load("schedule.json")
    optimizer = torch.optim.SGD(schedule.param_groups(model, base_lr=0.1), momentum=0.9)
    scheduler = schedule.to_torch(optimizer, total_steps=1000)
    # then, every inner step: optimizer.step(); scheduler.step()
"""

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from asg_env.core.layer_groups import build_param_groups, effective_lrs, set_learning_rates
from asg_env.core.optimizers import ScaledVelocitySGD, lr_factor

FORMAT, VERSION = "asg-env-schedule", 1


@dataclass(frozen=True)
class LearnedSchedule:
    """Multipliers of each layer group over the progress of a training.

    Attributes:
        layer_groups: Group name to parameter pattern (`re.match`), input to head.
        knots: Progress at which each window began, in [0, 1), increasing, the first 0; (T,).
        multipliers: Mean over `episodes` rollouts, dimensionless, (T, G). The value of a knot
            holds until the next (step interpolation).
        spread: Standard deviation over the rollouts, (T, G).
        base_lr: Base rate that the multipliers were learned with.
        optimizer: Name of the inner optimizer, such as `sgd`.
        momentum_form: `pytorch` or `scaled-velocity`.
        lr_factor: Common warm-up and decay, `constant` or `warmup-poly`.
        episodes: Rollouts averaged.
        task: Environment id.
        instances: Instance set of the rollouts.
        base_lr_scale: Hidden scale of the rollouts.
        inner_steps: Inner steps of a whole rollout.
        settings: Environment settings of the rollouts, as plain values.
        provenance: Where it came from: config digest, versions.
    """

    layer_groups: dict[str, str]
    knots: tuple[float, ...]
    multipliers: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    base_lr: float
    optimizer: str
    momentum_form: str
    lr_factor: str
    episodes: int
    task: str
    instances: str
    base_lr_scale: float
    inner_steps: int
    settings: dict[str, Any]
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what every reader relies on.

        Raises:
            ValueError: The shapes disagree, a number is not finite or is negative, the knots do
                not increase from 0, or a name or a pattern is none.
        """
        if not isinstance(self.layer_groups, dict) or not all(
            map(_is_pattern, self.layer_groups.values())
        ):
            raise ValueError(
                "schedule `layer_groups` must map names to patterns (regular expressions), got "
                f"{self.layer_groups}"
            )
        if not self.layer_groups:
            raise ValueError("schedule `layer_groups` must name at least one group, got none")
        if not isinstance(self.settings, dict):
            raise ValueError(f"schedule `settings` must be a mapping, got {self.settings!r}")
        knots = self.knots
        if (
            not knots
            or knots[0] != 0
            or any(not a < b for a, b in zip(knots, (*knots[1:], 1.0), strict=True))
        ):
            raise ValueError(
                f"schedule `knots` must increase from 0 and stay below 1, got {list(knots)}"
            )
        for name in ("multipliers", "spread"):
            rows = getattr(self, name)
            if len(rows) != len(knots) or any(len(r) != len(self.layer_groups) for r in rows):
                raise ValueError(
                    f"schedule `{name}` must be {len(knots)} knots x {len(self.layer_groups)} "
                    "groups; the file is damaged"
                )
            for value in (value for row in rows for value in row):
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"schedule `{name}` must be finite and >= 0, got {value}")
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ValueError(f"schedule `base_lr` must be a finite number > 0, got {self.base_lr}")
        if self.momentum_form not in ("pytorch", "scaled-velocity"):
            raise ValueError(
                "schedule `momentum_form` must be pytorch or scaled-velocity, got "
                f"{self.momentum_form!r}"
            )
        if self.lr_factor not in ("constant", "warmup-poly"):
            raise ValueError(
                f"schedule `lr_factor` must be constant or warmup-poly, got {self.lr_factor!r}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as JSON, to a temporary name first."""
        path = Path(path)
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LearnedSchedule":
        """Read a schedule.

        Raises:
            ValueError: The file is not a schedule, is newer than this code, or is damaged.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no JSON text"
            raise ValueError(
                f"{path} cannot be read as a schedule ({reason}); give a file of asg export"
            ) from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a schedule: its `format` must be '{FORMAT}'")
        version = record.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"{path} has schedule version {version}, this asg-env reads {VERSION}; "
                "use the asg-env that wrote it"
            )
        known = {f.name for f in fields(cls)}
        if set(record) != known:
            wrong = sorted(set(record) ^ known)
            raise ValueError(f"{path} must have the keys {sorted(known)}; wrong are {wrong}")
        try:
            for name in ("multipliers", "spread"):
                record[name] = tuple(tuple(float(v) for v in row) for row in record[name])
            record["knots"] = tuple(float(v) for v in record["knots"])
            return cls(**record)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def at(self, progress: float) -> tuple[float, ...]:
        """Multipliers at a progress in [0, 1], shape (G,)."""
        return self.multipliers[max(0, bisect_right(self.knots, progress) - 1)]

    def param_groups(self, model: nn.Module, base_lr: float | None = None) -> list[dict[str, Any]]:
        """Split `model` into the schedule's groups, ready for an optimizer.

        Args:
            model: Parameters with `requires_grad=False` are passed over.
            base_lr: Rate at multiplier 1; the schedule's own if left out.

        Returns:
            One parameter group per layer group, with `lr`, `initial_lr` and `name`.

        Raises:
            ValueError: A trainable parameter matches no group or several, or a group matches
                none.
        """
        return build_param_groups(
            model, self.layer_groups, self.base_lr if base_lr is None else base_lr
        )

    def to_torch(self, optimizer: Optimizer, total_steps: int) -> "ScheduleLR":
        """Return a scheduler that drives `optimizer`; call its `.step()` every inner step.

        Args:
            optimizer: Built on `param_groups`, in that order.
            total_steps: Inner steps of the whole training; progress is step / total_steps.

        Raises:
            ValueError: The optimizer's groups are others than the schedule's, its momentum has
                another form, or `total_steps` is not a positive integer.
        """
        return ScheduleLR(optimizer, self, total_steps)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


class ScheduleLR(LRScheduler):
    """lr_g = initial_lr_g * multiplier_g(step / total_steps) * common factor.

    Its `state_dict` holds plain numbers only; the schedule itself is in its file.
    """

    def __init__(self, optimizer: Optimizer, schedule: LearnedSchedule, total_steps: int) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"`total_steps` must be an integer >= 1, got {total_steps!r}")
        names = [group.get("name") for group in optimizer.param_groups]
        if names != list(schedule.layer_groups):
            raise ValueError(
                f"the optimizer's groups must be {list(schedule.layer_groups)}, got {names}; "
                "build it on schedule.param_groups(model)"
            )
        scaled_velocity = isinstance(optimizer, ScaledVelocitySGD)
        if scaled_velocity != (schedule.momentum_form == "scaled-velocity"):
            raise ValueError(
                f"the schedule was learned with momentum_form '{schedule.momentum_form}', got "
                f"{type(optimizer).__name__}; use the optimizer of that form"
            )
        self._schedule = schedule
        self._set_length(total_steps)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Rates of the coming inner step, one per group."""
        step = self.last_epoch
        multipliers = self._schedule.multipliers[bisect_right(self._starts, step) - 1]
        factor = lr_factor(self._schedule.lr_factor, step, self.total_steps)  # type: ignore[arg-type]
        return [
            effective_lrs(float(base_lr), (multiplier,), factor)[0]
            for base_lr, multiplier in zip(self.base_lrs, multipliers, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: where the schedule stands."""
        return {
            "last_epoch": self.last_epoch,
            "total_steps": self.total_steps,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self.get_last_lr()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, at its rates; the optimizer's own state is loaded separately.

        Before or after: making a scheduler sets the rates of its first step, here they are set
        back to those of the step to come.
        """
        self.__dict__.update(state_dict)
        self._set_length(self.total_steps)
        set_learning_rates(self.optimizer, [float(lr) for lr in self._last_lr])

    def _set_length(self, total_steps: int) -> None:
        # Window starts in whole inner steps: exact, where comparing step / total_steps with a
        # rounded knot would not be.
        self.total_steps = total_steps
        self._starts = [round(knot * total_steps) for knot in self._schedule.knots]
