"""Layer groups: which parameters share one learning-rate multiplier, and how it is applied."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import nn

# Ordered from input to head: group name -> regular expression, matched at the start of a
# parameter's name (`re.match`).
GroupPatterns = Mapping[str, str]

SHOWN = 5  # names in a message, at most
# Bounds of a base rate, of a hidden factor on it, of both together and of a multiplier: a rate, all
# of them multiplied, is a float32.
LARGEST_BASE_LR, LARGEST_SCALE, LARGEST_SCALED_LR, LARGEST_MULTIPLIER = 1e25, 1e4, 1e30, 1e6


def split_parameters(model: nn.Module, patterns: GroupPatterns) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter of `model` to exactly one layer group.

    Parameters with `requires_grad=False` are passed over.

    Args:
        model: The optimizee.
        patterns: Group name to regular expression, input to head.

    Returns:
        Group name to its parameters, in the order of `patterns` and `named_parameters()`.

    Raises:
        ValueError: A parameter matches no group or several, or a group matches none.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in patterns}
    unmatched, ambiguous = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owners = [group for group, pattern in patterns.items() if re.match(pattern, name)]
        if not owners:
            unmatched.append(name)
        elif len(owners) > 1:
            ambiguous.append(f"{name} ({', '.join(owners)})")
        else:
            groups[owners[0]].append(parameter)
    if unmatched:
        raise ValueError(
            f"trainable parameters match no layer group of {list(patterns)}: "
            f"{_few(unmatched)}; add a pattern or freeze them"
        )
    if ambiguous:
        raise ValueError(
            f"parameters match several layer groups: {_few(ambiguous)}; make the patterns disjoint"
        )
    empty = [name for name, parameters in groups.items() if not parameters]
    if empty:
        raise ValueError(
            f"layer groups {empty} match no trainable parameter of the model; "
            "use the groups of this model"
        )
    return groups


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def build_param_groups(
    model: nn.Module, patterns: GroupPatterns, base_lr: float
) -> list[dict[str, object]]:
    """Return PyTorch parameter groups, one per layer group, each at the base rate.

    Raises:
        ValueError: As `split_parameters`, or as `check_base_lr`.
    """
    base_lr = check_base_lr(base_lr)
    return [
        {"params": parameters, "lr": base_lr, "name": name}
        for name, parameters in split_parameters(model, patterns).items()
    ]


def check_base_lr(value: object) -> float:
    """Return a base rate that a training can have.

    Raises:
        ValueError: It is no number > 0, or with a multiplier it could be no float32.
    """
    # NumPy's numbers are of Real, too.
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number <= LARGEST_SCALED_LR:
        raise ValueError(
            f"`base_lr` must be a finite number > 0, at most {LARGEST_SCALED_LR:g}, got {value!r}"
        )
    return number


def effective_lrs(base_lr: float, multipliers: Sequence[float], factor: float = 1.0) -> list[float]:
    """Scale the base learning rate per layer group: lr_g = base_lr * m_g * factor.

    Source: ASG, the action of the L2O policy (docs/original.md, section 2). Python floats, so
    that a replay of the same multipliers gives the same bits.

    Args:
        base_lr: Learning rate per inner step; > 0.
        multipliers: m, dimensionless, G of them, input to head.
        factor: Warm-up or decay common to all groups, dimensionless.

    Returns:
        G learning rates.

    Raises:
        ValueError: A multiplier is negative or not finite.
    """
    for multiplier in multipliers:
        if not (math.isfinite(multiplier) and multiplier >= 0):
            raise ValueError(f"multipliers must be finite and >= 0, got {multiplier}")
    return [base_lr * multiplier * factor for multiplier in multipliers]


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Write one learning rate into each parameter group; no other code of ours writes `lr`.

    A rate that is a tensor is written in place: a captured or compiled step reads that tensor.
    (Beside it PyTorch's and timm's schedulers write the rates of `to_torch`, which does the same,
    and of `to_timm`, which puts a number in the tensor's place.)

    Raises:
        ValueError: There are more or fewer parameter groups than rates.
    """
    if len(rates) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer must have {len(rates)} parameter groups, as when it was taken over, "
            f"got {len(optimizer.param_groups)}; add groups before"
        )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
