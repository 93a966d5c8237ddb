"""Settings that single tasks have beside the common ones, and which belong to which task."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from asg_env.config import EnvSettings, InnerSteps
from asg_env.core.evaluation import Metric
from asg_env.core.layer_groups import LARGEST_BASE_LR
from asg_env.tasks.digit_sets import NEW_CLASSES, TargetName, five_digits
from asg_env.tasks.image_task import OUTER_VALID_FRACTION, HeadName


def _patterns(value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must map group names to regular expressions, got {value!r}")
    for name, pattern in value.items():
        try:
            if not isinstance(name, str) or not isinstance(pattern, str):
                raise ValueError(f"must map names to text, got {name!r}: {pattern!r}")
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"must map '{name}' to a regular expression, got '{pattern}' ({error})"
            ) from None
    return dict(value)


class DigitsSettings(EnvSettings):
    """Settings of `ASG/Digits-v0`: other digits, another width, another target domain."""

    classes: Annotated[tuple[int, ...], BeforeValidator(five_digits)] = NEW_CLASSES
    width: Annotated[float, Field(ge=0.25, le=8)] = 1.0
    target: TargetName = "mnist"


class DigitsImageNetSettings(EnvSettings):
    """Settings of `ASG/DigitsImageNet-v0`: the rate that destroys the network is far lower."""

    base_lr: Annotated[float, Field(gt=0, le=LARGEST_BASE_LR)] = 0.01


class ImageTaskSettings(EnvSettings):
    """What `ASG/VisDA17-v0` and `ASG/ImageFolder-v0` have in common.

    The base rate is the top of the grid; multipliers reach down from there.
    """

    inner_steps: InnerSteps = 20
    base_lr: Annotated[float, Field(gt=0, le=LARGEST_BASE_LR)] = 0.01
    store: str | None = None
    image_size: Annotated[int, Field(ge=16)] = 224  # [pixels]
    backbone: str = "torchvision:resnet101"
    weights: str = "pretrained"
    head: HeadName = "mlp"
    layer_groups: Annotated[dict[str, str], BeforeValidator(_patterns)] | None = None
    inner_valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    outer_valid_fraction: Annotated[float, Field(ge=0, lt=1)] = OUTER_VALID_FRACTION
    split_seed: Annotated[int, Field(ge=0)] = 0


class VisDA17Settings(ImageTaskSettings):
    """Settings of `ASG/VisDA17-v0`; defaults that differ from the original are in the docs."""

    inner_steps: InnerSteps = 100
    metric: Metric = "mean_recall"
    flip_average: bool = True
    root: str | None = None

    @model_validator(mode="after")
    def _check_images(self) -> "VisDA17Settings":
        if self.root is None and self.store is None:
            raise ValueError(
                "`root` must name the folder that holds train/ and validation/, or `store` one "
                "made by asg prepare, got neither; set env.root"
            )
        return self


class ImageFolderSettings(ImageTaskSettings):
    """Settings of `ASG/ImageFolder-v0`."""

    source: str | None = None
    target: str | None = None
    target_labels: bool = True

    @model_validator(mode="after")
    def _check_images(self) -> "ImageFolderSettings":
        if (self.source is None) != (self.target is None):
            raise ValueError(
                f"`source` and `target` must be given together, got source={self.source} and "
                f"target={self.target}; set both"
            )
        if self.source is None and self.store is None:
            raise ValueError(
                "`source` and `target` must name folders of images, or `store` one made by asg "
                "prepare, got neither; set env.source and env.target"
            )
        if not self.target_labels and self.outer_valid_fraction != OUTER_VALID_FRACTION:
            raise ValueError(
                "`outer_valid_fraction` divides a target with labels, got "
                f"{self.outer_valid_fraction} with target_labels=false; leave it out"
            )
        if self.source is None and not self.target_labels:
            raise ValueError(
                "`target_labels` is used with source and target only, a store knows what it "
                "holds; leave it out"
            )
        return self


TASK_SETTINGS: dict[str, type[EnvSettings]] = {
    "ASG/Digits-v0": DigitsSettings,
    "ASG/DigitsImageNet-v0": DigitsImageNetSettings,
    "ASG/VisDA17-v0": VisDA17Settings,
    "ASG/ImageFolder-v0": ImageFolderSettings,
}


def settings_class(task_id: str) -> type[EnvSettings]:
    """Return the class whose fields are the settings of a task."""
    return TASK_SETTINGS.get(task_id, EnvSettings)  # an unknown task is refused later
