"""The settings of the environment, typed."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from asg_env.actions import GRIDS, ActionName, GridName
from asg_env.core.augmentation import AugmentationName
from asg_env.core.evaluation import Metric
from asg_env.core.guidance import TERMS, Term, Weighted
from asg_env.core.layer_groups import LARGEST_BASE_LR
from asg_env.core.numerics import Precision
from asg_env.core.optimizers import LRFactor, MomentumForm, OptimizerName
from asg_env.core.trainer import TrainerSettings
from asg_env.instances import VARIED, Instance, InstanceSet, InstanceSplit
from asg_env.observations import ObservationName
from asg_env.rewards import DEFAULT_REWARD, REWARD_TERMS
from asg_env.user_code import absolute, is_user_code, load
from asg_env.validation import Settings, validate
from asg_env.windows import WindowMode, constant_windows, growing_windows

DEFAULT_KL_WEIGHT = 0.1  # the original's, for VisDA-17


def _named_weights(value: Any, known: tuple[str, ...], what: str) -> Any:
    """Accept a name or a mapping of names to finite weights."""
    if isinstance(value, str):
        value = {value: 1.0}
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a name or a mapping of names to weights, got {value!r}")
    for name, weight in value.items():
        if name not in known:
            raise ValueError(f"must name a {what} of {', '.join(known)}, got '{name}'")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"must map '{name}' to a number, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"must map '{name}' to a finite number, got {weight}")
    return {name: float(weight) for name, weight in value.items()}


def _reward(value: Any) -> Any:
    weights = _named_weights(value, tuple(REWARD_TERMS), "reward term")
    if not weights:
        raise ValueError("must hold at least one reward term, got none")
    return weights


def _guidance(value: Any) -> Any:
    """Accept a name, or names to weights, or to mappings of `weight`, `cap` and options."""
    if isinstance(value, str):
        value = {value: 1.0}
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a name or a mapping of names to weights, got {value!r}")
    entries: dict[str, Any] = {}
    for name, entry in value.items():
        asked = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
        if not isinstance(name, str) or (name not in TERMS and not is_user_code(name)):
            raise ValueError(
                f"must name guidance terms of {', '.join(TERMS)}, or FILE.py:NAME, got '{name}'"
            )
        if is_user_code(name):
            name = absolute(name)
            if _label(name) in TAKEN:
                raise ValueError(
                    f"must name terms of one's own other than {', '.join(TAKEN)}, which are "
                    f"reported anyway, got '{name}'; call the class something else"
                )
        _guidance_entry(name, asked)
        short = isinstance(entry, Mapping) and set(asked) != {"weight"}
        entries[name] = asked if short else float(asked["weight"])
    labels = [_label(name) for name in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"must name each term once, got {', '.join(labels)}")
    return entries


# What terms of one's own cannot be called: `info` and observations hold these of every training.
TAKEN = ("ce", "kl", "inner_valid_loss")


def _guidance_entry(name: str, asked: dict[str, Any]) -> None:
    if "weight" not in asked:
        raise ValueError(f"must give '{name}' a weight, got {asked}")
    for key, bound in (("weight", ">= 0"), ("cap", "> 0")):
        number = asked.get(key, 1.0)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"must map '{name}' to a {key} that is a number, got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"must map '{name}' to a finite {key}, got {number}")
        if number < 0 or (key == "cap" and number == 0):
            raise ValueError(f"must map '{name}' to a {key} {bound}, got {number}")
        if key in asked:
            asked[key] = float(number)
    parameters = list(inspect.signature(_term(name)).parameters.values())[1:]
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(asked) - {"weight", "cap", *known}, key=str)
    if unknown and len(known) == len(parameters):
        options = ", ".join(["weight", "cap", *known])
        raise ValueError(f"must give '{name}' keys of {options}, got '{unknown[0]}'")
    for parameter in parameters:
        default = parameter.default
        if default is parameter.empty and parameter.name in known and parameter.name not in asked:
            raise ValueError(f"must give '{name}' its `{parameter.name}`, got none")
        kind = str if isinstance(default, str) else int | float
        value = asked.get(parameter.name, default)
        if isinstance(default, str | int | float) and (
            not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ValueError(
                f"must give '{name}' a `{parameter.name}` of the kind of {default!r}, got {value!r}"
            )


def _term(name: str) -> Callable[..., Term]:
    """Return what builds the guidance term of this name."""
    found: Callable[..., Term] = load(name) if is_user_code(name) else TERMS[name]
    return found


def _label(name: str) -> str:
    """Return what a guidance term is called in observations, `info` and tables."""
    return name.rpartition(":")[2]


def _inner_steps(value: Any) -> Any:
    if value in ("asg-as-coded", "asg-intended"):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"must be an integer >= 1, 'asg-as-coded' or 'asg-intended', got {value!r}"
        )
    return value


InnerSteps = Annotated[int | WindowMode, BeforeValidator(_inner_steps)]


class EnvSettings(Settings):
    """Keyword arguments of `gym.make`: one vocabulary for Python, YAML and `--set`.

    Tasks on one's own images have more (`asg_env.task_settings`), and defaults of their own.
    Rates are per inner step; multipliers and weights are dimensionless. The table in
    docs/environment.md lists each with its default.
    """

    instances: InstanceSet = "fixed"
    split: InstanceSplit = "train"
    horizon: Annotated[int, Field(ge=1)] | None = None  # [env steps], 15 unless derived
    inner_steps: InnerSteps = 10
    steps_per_epoch: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    action: ActionName = "relative"
    grid: GridName = "log"
    start_multiplier: Annotated[float, Field(ge=0, le=1)] = 0.01
    observation: ObservationName = "scaled"
    reward: Annotated[dict[str, float], BeforeValidator(_reward)] = {DEFAULT_REWARD: 1.0}
    outer_valid_size: Annotated[int, Field(ge=1)] | None = None  # [images], 500 or all there are
    metric: Metric = "accuracy"
    flip_average: bool = False
    guidance: Annotated[dict[str, Any], BeforeValidator(_guidance)] | None = None
    kl_weight: Annotated[float, Field(ge=0)] | None = None
    optimizer: OptimizerName = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None  # 0.9 with sgd
    momentum_form: MomentumForm = "pytorch"
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    base_lr: Annotated[float, Field(gt=0, le=LARGEST_BASE_LR)] = 0.3
    lr_factor: LRFactor = "constant"
    batch_size: Annotated[int, Field(ge=1)] = 32  # [images]
    augmentation: AugmentationName = "none"
    precision: Precision = "float32"
    compile: bool = False
    deterministic: bool = False
    device: str = "cpu"

    @model_validator(mode="after")
    def _check_combinations(self) -> "EnvSettings":
        grown = isinstance(self.inner_steps, str)
        for name in ("steps_per_epoch", "epochs"):
            if grown and getattr(self, name) is None:
                raise ValueError(f"`{name}` must be given with inner_steps={self.inner_steps}")
            if not grown and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is used by growing windows only, got inner_steps="
                    f"{self.inner_steps}; leave it out"
                )
        if grown and self.horizon is not None:
            raise ValueError(
                f"`horizon` follows from steps_per_epoch and epochs with inner_steps="
                f"{self.inner_steps}, got {self.horizon}; leave it out"
            )
        for name in VARIED[self.instances]:
            field = type(self).model_fields.get(name)
            if field is None:
                raise ValueError(
                    f"`instances` must be fixed or unknown-scale on this task, got "
                    f"{self.instances}, which varies {name}; ASG/Digits-v0 has that"
                )
            if getattr(self, name) != field.default:
                raise ValueError(
                    f"`{name}` is set by each instance of {self.instances}, got "
                    f"{getattr(self, name)}; leave it out"
                )
        if "optimizer" in VARIED[self.instances] and self.momentum_form != "pytorch":
            raise ValueError(
                f"`momentum_form` must be pytorch with instances {self.instances}, some of which "
                f"train with Adam, got {self.momentum_form}; leave it out"
            )
        if grown and "horizon" in VARIED[self.instances]:
            raise ValueError(
                f"`inner_steps` must be an integer with instances {self.instances}, which vary "
                f"the horizon, got {self.inner_steps}"
            )
        if self.guidance is not None and self.kl_weight is not None:
            raise ValueError("`kl_weight` is short for guidance={'kl': x}, got both; give one")
        if self.optimizer != "sgd" and self.momentum_form != "pytorch":
            raise ValueError(
                f"`momentum_form` must be pytorch with optimizer {self.optimizer}, got "
                f"{self.momentum_form}; scaled velocity is a form of SGD"
            )
        if self.optimizer not in ("sgd", "schedule-free") and self.momentum is not None:
            raise ValueError(
                f"`momentum` is used by sgd and schedule-free only, got optimizer "
                f"{self.optimizer}; leave it out"
            )
        if self.optimizer == "schedule-free" and self.momentum == 0:
            raise ValueError("`momentum` must be > 0 with optimizer schedule-free, got 0")
        if self.action == "relative" and self.start_multiplier not in GRIDS[self.grid]:
            raise ValueError(
                f"`start_multiplier` must be a level of the {self.grid} grid "
                f"{list(GRIDS[self.grid])} with relative actions, got {self.start_multiplier}; "
                "set one of these"
            )
        return self

    def windows(self) -> tuple[int, ...]:
        """Inner steps of each env step."""
        if isinstance(self.inner_steps, str):
            assert self.steps_per_epoch is not None
            assert self.epochs is not None
            return growing_windows(self.inner_steps, self.steps_per_epoch, self.epochs)
        return constant_windows(self.inner_steps, self.horizon or 15)

    def guidance_terms(self) -> dict[str, Weighted]:
        """Guidance terms of the objective, by what they are called in `info`."""
        asked = self.guidance
        if asked is None:
            asked = {"kl": DEFAULT_KL_WEIGHT if self.kl_weight is None else self.kl_weight}
        terms = {}
        for name, entry in asked.items():
            options = dict(entry) if isinstance(entry, dict) else {"weight": entry}
            weight, cap = options.pop("weight"), options.pop("cap", None)
            terms[_label(name)] = Weighted(_term(name), weight, cap, options)
        return terms

    def further_terms(self) -> tuple[str, ...]:
        """Guidance terms other than KL, which everything reports anyway."""
        return tuple(name for name in self.guidance_terms() if name != "kl")

    def trainer_settings(self) -> TrainerSettings:
        """The part that the inner trainer uses."""
        return TrainerSettings(
            base_lr=self.base_lr,
            total_steps=sum(self.windows()),
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            momentum=0.9 if self.momentum is None else self.momentum,
            momentum_form=self.momentum_form,
            weight_decay=self.weight_decay,
            lr_factor=self.lr_factor,
            augmentation=self.augmentation,
            flip_average=self.flip_average,
            precision=self.precision,
            compile=self.compile,
            deterministic=self.deterministic,
        )

    def of(self, instance: Instance) -> "EnvSettings":
        """Return the settings that one instance is trained with: its own in the place of these.

        Raises:
            ConfigError: The task has no such setting, or it does not go with the others.
        """
        changes = instance.changes()
        if not changes:
            return self
        if changes.get("optimizer", "sgd") != "sgd":
            changes["momentum"] = None  # used by SGD alone
        return validate(
            type(self), {**self.model_dump(), **changes, "instances": "fixed"}, "instance"
        )

    def task_arguments(self) -> dict[str, Any]:
        """The task's own settings: what `load_task` of the task takes."""
        own = [name for name in type(self).model_fields if name not in EnvSettings.model_fields]
        return {name: getattr(self, name) for name in own}
