"""`LearnedSchedule`: learned multipliers as a file, reused in ordinary PyTorch training.

Example:
    schedule = LearnedSchedule.load("schedule.json").by_depth(model)
    print(schedule.table(model))
    optimizer = torch.optim.SGD(schedule.param_groups(model, base_lr=0.1), momentum=0.9)
    scheduler = schedule.to_torch(optimizer, total_steps=1000)
    # then, every inner step: optimizer.step(); scheduler.step()
"""

import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from torch import nn
from torch.optim import Optimizer

from asg_env.core.layer_groups import (
    LARGEST_MULTIPLIER,
    LARGEST_SCALE,
    LARGEST_SCALED_LR,
    build_param_groups,
)
from asg_env.core.optimizers import LRFactor, MomentumForm
from asg_env.files import replacing
from asg_env.validation import ConfigError, Settings, sentence, validate

if TYPE_CHECKING:
    from asg_env.schedulers import ScheduleLR
    from asg_env.timm_scheduler import TimmScheduleLR

FORMAT: Final = "asg-env-schedule"
VERSION: Final = 1
Interpolation = Literal["step", "linear", "log-linear"]
Selection = Literal["mean", "median", "best"]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {text!r} ({error})") from None
    return text


def _increasing(knots: tuple[float, ...]) -> tuple[float, ...]:
    following = (*knots[1:], 1.0)
    if knots[0] != 0 or any(not a < b for a, b in zip(knots, following, strict=True)):
        raise ValueError(f"must increase from 0 and stay below 1, got {list(knots)}")
    return knots


# JSON has lists: these become tuples, while their numbers stay as strict as all others.
NotNegative = Annotated[float, Field(ge=0, le=LARGEST_MULTIPLIER)]
Rows = Annotated[
    tuple[Annotated[tuple[NotNegative, ...], Strict(False)], ...],
    Strict(False),
]
Knots = Annotated[
    tuple[Annotated[float, Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1})], ...],
    Strict(False),
    Field(min_length=1),
    AfterValidator(_increasing),
]
Patterns = Annotated[
    dict[str, Annotated[str, AfterValidator(_pattern)]],
    Field(min_length=1),
]


def _complete(schema: dict[str, Any]) -> None:
    """Say which JSON Schema this is, and that files must name format and version."""
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"].extend(("format", "version"))


class LearnedSchedule(Settings):
    """Multipliers of each layer group over the progress of a training.

    T is the number of knots, G that of layer groups. The JSON Schema of the file is
    `asg_env/schedule.schema.json`.
    """

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra=_complete,
    )

    format: Literal["asg-env-schedule"] = FORMAT
    """What the file is."""
    version: Literal[1] = VERSION
    """Of the format."""
    layer_groups: Patterns
    """Group name to a regular expression, matched at the start of parameters' names; input to
    head."""
    sources: dict[str, str] = {}
    """Group name to the group that it was learned for, where the schedule was made for another
    model."""
    interpolation: Interpolation = "step"
    """Between knots: `step` holds the value of the last knot, `linear` and `log-linear` go to that
    of the next (`log-linear` linearly where one of the two is 0). The last knot's value holds."""
    knots: Knots
    """Progress at which each window began, in [0, 1), increasing, the first 0; (T,)."""
    multipliers: Rows
    """Dimensionless, >= 0; (T, G)."""
    spread: Rows
    """Standard deviation of the multipliers over all rollouts; (T, G)."""
    base_lr: Annotated[float, Field(gt=0, le=LARGEST_SCALED_LR)]
    """Base rate that the multipliers were learned with; it contains `base_lr_scale`."""
    optimizer: str
    """Inner optimizer that they were learned with, such as `sgd`."""
    momentum_form: MomentumForm
    """Of that optimizer."""
    lr_factor: LRFactor
    """Common warm-up and decay; stretched with the training."""
    selection: Selection = "mean"
    """What the multipliers are: the mean of the rollouts, the rollout nearest to their median, or
    the one with the best accuracy on outer_valid."""
    episodes: Annotated[int, Field(ge=1)]
    """Rollouts."""
    task: str
    """Environment id."""
    instances: str
    """Instance set of the rollouts."""
    base_lr_scale: Annotated[float, Field(gt=0, le=LARGEST_SCALE)]
    """Hidden factor on the base rate in the rollouts."""
    inner_steps: Annotated[int, Field(ge=1)]
    """Inner steps of a whole rollout."""
    settings: dict[str, Any]
    """Environment settings of the rollouts."""
    provenance: dict[str, str] = {}
    """Where it came from: config digest, training seed, versions."""

    def __init__(self, /, **values: Any) -> None:
        """Check values as a file's are.

        Raises:
            ValueError: One is missing or cannot be used; one sentence says which and why.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(sentence(error, type(self), "schedule")) from None

    @model_validator(mode="after")
    def _check_shapes(self) -> "LearnedSchedule":
        for name in ("multipliers", "spread"):
            rows = getattr(self, name)
            if len(rows) != len(self.knots) or any(len(r) != len(self.layer_groups) for r in rows):
                raise ValueError(
                    f"`schedule.{name}` must be {len(self.knots)} knots x "
                    f"{len(self.layer_groups)} layer groups, got {len(rows)} rows of "
                    f"{sorted({len(r) for r in rows})}; mend it"
                )
        unknown = sorted(set(self.sources) - set(self.layer_groups))
        if unknown:
            raise ValueError(
                f"`schedule.sources` must name groups of `layer_groups`, got {unknown}; mend the "
                "file"
            )
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as JSON, a row of multipliers a line, to a temporary name first."""
        lines = [f'  "{key}": {_text(value)}' for key, value in self.model_dump().items()]
        with replacing(Path(path)) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LearnedSchedule":
        """Read a schedule.

        Raises:
            ValueError: The file is not a schedule, is newer than this code, or is damaged.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            reason = "it is no JSON text"
            if isinstance(error, OSError):
                reason = str(error.strerror)
            elif isinstance(error, json.JSONDecodeError):
                reason = f"it is no JSON text: line {error.lineno}, {error.msg}"
            raise ValueError(
                f"{path} cannot be read as a schedule ({reason}); give a .json of asg export"
            ) from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a schedule: its `format` must be '{FORMAT}'; give a file of asg "
                "export"
            )
        if repr(record.get("version")) != repr(VERSION):  # true and 1.0 are no versions
            raise ValueError(
                f"{path} has schedule version {record.get('version')!r}, this asg-env reads "
                f"{VERSION}; use the asg-env that wrote it"
            )
        try:
            return validate(cls, record, "schedule")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def with_changes(self, **changes: Any) -> "LearnedSchedule":
        """Return the schedule with some fields changed, checked as a file is.

        Raises:
            ValueError: A value cannot be used.
        """
        return validate(LearnedSchedule, {**dict(self), **changes}, "schedule")

    def at(self, progress: float) -> tuple[float, ...]:
        """Multipliers at a progress in [0, 1], shape (G,)."""
        return self.interpolated(self.knots, progress)

    def interpolated(self, starts: Sequence[float], where: float) -> tuple[float, ...]:
        """Multipliers at `where`, shape (G,), with the knots at `starts`, in any unit; (T,)."""
        index = max(0, bisect_right(starts, where) - 1)
        here = self.multipliers[index]
        if self.interpolation == "step" or index + 1 == len(starts):
            return here
        share = (where - starts[index]) / (starts[index + 1] - starts[index])
        if not share > 0:  # at the knot itself, to the last bit
            return here
        between = _linear if self.interpolation == "linear" else _log_linear
        return tuple(map(between, here, self.multipliers[index + 1], [share] * len(here)))

    def regroup(
        self, layer_groups: Mapping[str, str], sources: Mapping[str, str] | None = None
    ) -> "LearnedSchedule":
        """Return the schedule for a model whose parameters have other names.

        Args:
            layer_groups: Group name to regular expression, input to head.
            sources: Group name to the schedule's group whose multipliers it gets; left out for
                groups that are called as the schedule's.

        Raises:
            ValueError: A group gets its multipliers from none of the schedule's groups.
        """
        from asg_env.regrouping import regroup

        return regroup(self, layer_groups, sources or {})

    def by_depth(self, model: nn.Module, head: str | None = None) -> "LearnedSchedule":
        """Return the schedule for a model of any depth: every block gets a layer group.

        See `asg_env.regrouping.depth_groups` for the groups. The head gets the multipliers of
        the schedule's last group, every other group those at its relative depth.

        Args:
            model: Any; print the `table` to see what went where.
            head: Name of the module that is the head; the last layer if left out.

        Raises:
            ValueError: The model has no head that could be told from its body.
        """
        from asg_env.regrouping import by_depth

        return by_depth(self, model, head)

    def table(self, model: nn.Module) -> str:
        """Return what of the model goes where: a line for each layer group.

        Raises:
            ValueError: As `param_groups`.
        """
        from asg_env.regrouping import table

        return table(self, model)

    def param_groups(
        self,
        model: nn.Module,
        base_lr: float | None = None,
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Split `model` into the schedule's groups, ready for an optimizer.

        Args:
            model: Parameters with `requires_grad=False` are passed over.
            base_lr: Rate at multiplier 1; the schedule's own if left out.
            weight_decay: If given, a layer group becomes up to two parameter groups: its matrices
                and kernels with this weight decay, and, named `.../no_decay`, its biases, norms and
                what timm's `model.no_weight_decay()` lists with none.

        Returns:
            Parameter groups with `lr` and `name`, input to head; where a layer group became two,
            also with its name as `layer_group`.

        Raises:
            ValueError: A trainable parameter matches no group or several, a group matches none, or
                a number is out of range.
        """
        if weight_decay is not None and (
            isinstance(weight_decay, bool | str)
            or not (math.isfinite(weight_decay) and weight_decay >= 0)
        ):
            raise ValueError(f"`weight_decay` must be a finite number >= 0, got {weight_decay!r}")
        groups = build_param_groups(
            model, self.layer_groups, self.base_lr if base_lr is None else base_lr
        )
        if weight_decay is None:
            return groups
        listed: set[str] = getattr(model, "no_weight_decay", set)()
        spared = {id(p) for name, p in model.named_parameters() if p.ndim < 2 or name in listed}
        return _split_by_decay(groups, weight_decay, spared)

    def to_torch(self, optimizer: Optimizer, total_steps: int) -> "ScheduleLR":
        """Return a scheduler that drives `optimizer`; call its `.step()` every inner step.

        It is what Hugging Face's `Trainer(optimizers=...)` and Lightning take, too. With gradient
        accumulation an inner step is one of the optimizer.

        Args:
            optimizer: Built on `param_groups`, in that order.
            total_steps: Inner steps of the whole training, all epochs; the schedule is stretched
                or squeezed to it.

        Raises:
            ValueError: The optimizer's groups are others than the schedule's, it cannot take
                rates by group or has another form of momentum, or `total_steps` is not a
                positive integer.
        """
        from asg_env.schedulers import ScheduleLR

        return ScheduleLR(optimizer, self, total_steps)

    def to_timm(self, optimizer: Optimizer, total_steps: int) -> "TimmScheduleLR":
        """Return a timm scheduler; call its `.step_update(n)` after the n-th inner step.

        Args:
            optimizer: As for `to_torch`.
            total_steps: As for `to_torch`.

        Raises:
            ValueError: As for `to_torch`.
            ImportError: timm is not installed.
        """
        from asg_env.timm_scheduler import TimmScheduleLR

        return TimmScheduleLR(optimizer, self, total_steps)

    def to_optax(
        self, total_steps: int, base_lr: float | None = None
    ) -> dict[str, Callable[[Any], Any]]:
        """Return one optax schedule for each layer group, from step count to learning rate.

        `optax.multi_transform({name: optax.sgd(rate) for name, rate in ...items()}, labels)` uses
        them; labels are the groups' names in the shape of the parameters.

        Args:
            total_steps: As for `to_torch`.
            base_lr: Rate at multiplier 1; the schedule's own if left out.

        Raises:
            ValueError: `total_steps` is not a positive integer, `base_lr` not a positive number, or
                the rates were learned with another form of momentum than optax has.
            ImportError: JAX is not installed.
        """
        from asg_env.schedulers import optax_schedules

        return optax_schedules(self, total_steps, self.base_lr if base_lr is None else base_lr)


def _linear(before: float, after: float, share: float) -> float:
    return before + share * (after - before)


def _log_linear(before: float, after: float, share: float) -> float:
    if before == 0 or after == 0:
        return _linear(before, after, share)
    power: float = before * (after / before) ** share
    return power


def _split_by_decay(
    groups: list[dict[str, Any]], weight_decay: float, spared: set[int]
) -> list[dict[str, Any]]:
    split = []
    for group in groups:
        for decay, decays in ((weight_decay, True), (0.0, False)):
            chosen = [p for p in group["params"] if (id(p) not in spared) == decays]
            if chosen:
                layer = group["name"]
                name = layer if decays else f"{layer}/no_decay"  # frameworks log rates by name
                split.append(
                    {
                        **group,
                        "params": chosen,
                        "weight_decay": decay,
                        "name": name,
                        "layer_group": layer,
                    }
                )
    return split


def _text(value: Any) -> str:
    """JSON of a value: of a matrix a row a line, of a mapping an entry a line."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[\n    " + ",\n    ".join(json.dumps(row) for row in value) + "\n  ]"
    if isinstance(value, dict):
        return json.dumps(value, indent=2).replace("\n", "\n  ")
    return json.dumps(value)
