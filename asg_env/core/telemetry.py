"""What a window of inner steps reports, gathered with one host synchronisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Telemetry:
    """Report of one window of K inner steps; may hold non-finite numbers when `diverged`.

    Attributes:
        ce: Cross-entropy of the new head, mean over the window's steps, nats.
        kl: KL(teacher || student), unweighted, mean over the window's steps, nats.
        objective: CE plus weighted guidance, mean over the window's steps.
        head_mean: Mean of the head's last weight matrix, averaged over the steps.
        head_std: Its standard deviation (unbiased), averaged over the steps.
        grad_norms: L2 norm of the last step's gradient per layer group, (G,).
        drifts: Relative L2 distance ||w - w0|| / ||w0|| from the start of training, (G,). For
            the head, w0 is its initial draw.
        update_ratios: ||w_end - w_start|| / ||w_end|| over the window, (G,).
        diverged: A loss, gradient norm or weight was not finite.
        cause: Which one, in words; "" if none.
    """

    ce: float
    kl: float
    objective: float
    head_mean: float
    head_std: float
    grad_norms: tuple[float, ...]
    drifts: tuple[float, ...]
    update_ratios: tuple[float, ...]
    diverged: bool
    cause: str


def group_norms(tensors: Sequence[Tensor], owners: Tensor, groups: int) -> Tensor:
    """L2 norms of several lists of parameters, layer group by layer group, without a host sync.

    Args:
        tensors: R lists of P tensors each, one list after another.
        owners: Index of each parameter's layer group, int64, shape (P,).
        groups: G.

    Returns:
        Norms, shape (R, G).
    """
    squares = torch.stack(torch._foreach_norm(list(tensors))).square_().view(-1, len(owners))
    return squares.new_zeros(len(squares), groups).index_add_(1, owners, squares).sqrt_()


def summarise_window(
    steps: Sequence[Tensor],
    owners: Tensor,
    groups: int,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    initial: Sequence[Tensor],
    previous: Sequence[Tensor],
) -> Telemetry:
    """Reduce a window to its report; the `.tolist()` below is the window's one host sync.

    Args:
        steps: Per inner step its ce, kl, objective, head mean and head std, one after another.
        owners: Index of each parameter's layer group, int64, shape (P,).
        groups: G.
        weights: Parameters after the window, group after group.
        gradients: Gradients of the last inner step.
        initial: Parameters at the start of training.
        previous: Parameters at the start of the window.
    """
    moved = torch._foreach_sub(list(weights), list(initial))
    stepped = torch._foreach_sub(list(weights), list(previous))
    norms = group_norms([*weights, *gradients, *initial, *moved, *stepped], owners, groups)
    means = torch.stack(list(steps)).view(-1, 5).mean(dim=0)
    report = torch.cat([means, norms.flatten()]).tolist()
    ce, kl, objective, head_mean, head_std = report[:5]
    weight_norms, grad_norms, initial_norms, moved_norms, stepped_norms = (
        tuple(report[5 + groups * i : 5 + groups * (i + 1)]) for i in range(5)
    )
    drifts = tuple(m / max(n, 1e-12) for m, n in zip(moved_norms, initial_norms, strict=True))
    ratios = tuple(s / max(n, 1e-12) for s, n in zip(stepped_norms, weight_norms, strict=True))
    cause = ""
    if not all(map(math.isfinite, (ce, kl, objective))):
        cause = "a training loss is not finite"
    elif not all(map(math.isfinite, grad_norms)):
        cause = "a gradient norm is not finite"
    elif not all(map(math.isfinite, (*weight_norms, *moved_norms, *stepped_norms))):
        cause = "a weight is not finite"
    return Telemetry(
        ce, kl, objective, head_mean, head_std, grad_norms, drifts, ratios, bool(cause), cause
    )
