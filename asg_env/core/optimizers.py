"""Inner optimizers by name, and the learning-rate factor common to all groups."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

OptimizerName = Literal["sgd", "adam", "adamw", "prodigy", "schedule-free"]
MomentumForm = Literal["pytorch", "scaled-velocity"]
LRFactor = Literal["constant", "warmup-poly"]


class OneRateError(ValueError):
    """Different rates were asked of an optimizer that takes one for all layer groups."""


ONE_RATE: tuple[OptimizerName, ...] = ("prodigy",)  # refuse different rates per layer group


def build_optimizer(
    param_groups: list[dict[str, Any]],
    name: OptimizerName = "sgd",
    momentum: float = 0.9,
    momentum_form: MomentumForm = "pytorch",
    weight_decay: float = 0.0,
    *,
    fused: bool = False,
) -> Optimizer:
    """Return the named optimizer over the given parameter groups.

    `prodigy` (Mishchenko and Defazio, 2024) estimates its own step length, which `lr` scales:
    1 is its authors' value. Its step raises RuntimeError where groups have different rates,
    save 0. `schedule-free` is the SGD of Defazio et al. (2024). It is returned in train mode:
    the parameters hold the points where gradients are taken, and the averaged weights, which
    are those to evaluate, are there between its `eval()` and `train()`. A rate of 0 stops its
    steps, not the averaging.

    Args:
        param_groups: One per layer group, with `lr` set.
        name: `sgd`, `adam` or `adamw` (the latter two at PyTorch's betas), `prodigy` or
            `schedule-free`.
        momentum: Dimensionless, for `sgd` and `schedule-free`, which needs one > 0.
        momentum_form: `pytorch` keeps raw gradients in the buffer and scales the whole buffer
            by today's rate; `scaled-velocity` is the original's (see `ScaledVelocitySGD`).
        weight_decay: Coefficient of the L2 term (decoupled for `adamw` and `prodigy`).
        fused: PyTorch's fused kernels, for CUDA; else its multi-tensor ones. Not for `prodigy`
            and `schedule-free`, which have their own.

    Raises:
        ImportError: The optimizer's package is not installed.
        ValueError: `scaled-velocity` was asked of an optimizer other than `sgd`.
    """
    if name == "sgd":
        if momentum_form == "scaled-velocity":
            return ScaledVelocitySGD(param_groups, momentum=momentum, weight_decay=weight_decay)
        return torch.optim.SGD(
            param_groups,
            momentum=momentum,
            weight_decay=weight_decay,
            fused=fused,
            foreach=not fused,
        )
    if momentum_form != "pytorch":
        raise ValueError(
            f"`momentum_form` must be 'pytorch' with optimizer '{name}', got '{momentum_form}'; "
            "scaled velocity is a form of SGD"
        )
    if name == "adam":
        return torch.optim.Adam(
            param_groups, weight_decay=weight_decay, fused=fused, foreach=not fused
        )
    if name == "prodigy":
        return _prodigy(param_groups, weight_decay)
    if name == "schedule-free":
        return _schedule_free(param_groups, momentum, weight_decay)
    return torch.optim.AdamW(
        param_groups, weight_decay=weight_decay, fused=fused, foreach=not fused
    )


def _prodigy(param_groups: list[dict[str, Any]], weight_decay: float) -> Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("prodigy", "prodigyopt", error) from None
    # Per group: given as an argument, it makes the package print a line for every optimizer.
    optimizer: Optimizer = Prodigy(
        [{**group, "weight_decay": weight_decay} for group in param_groups]
    )
    return optimizer


def _schedule_free(
    param_groups: list[dict[str, Any]], momentum: float, weight_decay: float
) -> Optimizer:
    try:
        from schedulefree import SGDScheduleFree
    except ImportError as error:
        raise _missing("schedule-free", "schedulefree", error) from None
    optimizer = SGDScheduleFree(
        param_groups, momentum=momentum, weight_decay=weight_decay, warmup_steps=0
    )
    optimizer.train()
    built: Optimizer = optimizer
    return built


def _missing(name: OptimizerName, package: str, error: ImportError) -> ImportError:
    if error.name != package:  # it is there, but something that it needs is not
        return error
    return ImportError(
        f"optimizer '{name}' needs the package {package}; pip install 'asg-env[rivals]'"
    )


class ScaledVelocitySGD(Optimizer):
    """SGD whose momentum buffer holds steps already scaled by the rate of their time.

    v <- momentum * v + lr * (g + weight_decay * w);  w <- w - v

    Source: the optimizer of the original's classification scripts (docs/original.md, section
    3). It equals PyTorch's SGD while the rate is constant. When the rate of a group drops to 0,
    PyTorch's form freezes the group at once; here the past steps keep their size and die away
    by `momentum` per step. Differs from the original at momentum 0, where that applied the
    gradient without the rate.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[torch.Tensor],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            if group["weight_decay"]:
                decayed = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
                gradients = list(decayed)
            for p in params:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients, alpha=group["lr"])
            torch._foreach_sub_(params, velocities)
        return loss


def lr_factor(name: LRFactor, inner_step: float, total_steps: int) -> float:
    """Warm-up and decay common to all layer groups, dimensionless.

    `warmup-poly` is the original's segmentation schedule (docs/original.md, section 3):
    quadratic warm-up from 1 % over 100 steps times polynomial decay of power 0.9, its progress
    held at 0.8, so that the factor never falls below 0.2**0.9.

    Args:
        name: `constant` or `warmup-poly`.
        inner_step: 0-based index of the inner step; a fraction where a training is stretched.
        total_steps: Inner steps of the whole training.
    """
    if name == "constant":
        return 1.0
    warmup = min(0.01 + 0.99 * (inner_step / 100) ** 2, 1.0)
    decay: float = (1 - min(inner_step / total_steps, 0.8)) ** 0.9
    return warmup * decay
