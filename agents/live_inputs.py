"""What a loop hands to `L2OController`, checked: layer groups, losses, whole numbers."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agents.controller_file import check_order
from asg_env.schedulers import layer_group_names, runs_of

Loss = float | Tensor


def layer_groups_of(
    optimizer: Optimizer, learned: Sequence[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Index of each parameter group's layer group, and their names.

    Args:
        optimizer: Whose groups they are.
        learned: Names of the controller's own layer groups, input to head.
    """
    names = layer_group_names(optimizer)
    if None in names:  # groups with and without weight decay, say, are no layer groups
        raise ValueError(
            "parameter groups must have the `name` of their layer group, input to head, got "
            f"{len(names)} groups, {names.count(None)} without; build the optimizer on groups such "
            "as those of schedule.param_groups(model)"
        )
    owners, layers = runs_of(names)
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"parameter groups of one layer group must be neighbours, got {names}; put them so"
        )
    check_order(layers, learned)
    return owners, tuple(layers)


def scalar(name: str, value: Loss, like: Tensor) -> Tensor:
    """A loss of its own memory, which the loop may use again; a number without a wait for it."""
    if not isinstance(value, Tensor):
        plain = number(name, value)
        if abs(plain) > torch.finfo(like.dtype).max:  # PyTorch would raise
            plain = math.copysign(math.inf, plain)
        return like.new_full((), plain)
    if value.numel() != 1:
        raise ValueError(f"`{name}` must be one number, got shape {tuple(value.shape)}; average it")
    return value.detach().reshape(()).clone().to(like)


def number(name: str, value: Any) -> float:
    """Return a number, of whatever type it is."""
    try:
        if isinstance(value, str):  # float() would read it
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"`{name}` must be one number or a tensor of one, got {value!r}; give the mean loss"
        ) from None


def is_like(value: Any, shape: torch.Size) -> bool:
    """Whether something is a tensor of a shape."""
    return isinstance(value, Tensor) and value.shape == shape


def whole(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return an integer within its bounds."""
    bounds = f">= {low}" if high is None else f"from {low} to {high}"
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < low or (high is not None and found > high):
        raise ValueError(f"`{name}` must be an integer {bounds}, got {value!r}; set it so")
    return found
