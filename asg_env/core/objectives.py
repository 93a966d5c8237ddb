"""What an inner step minimises: the task loss, and the distances that guidance is made of."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_to_teacher(
    teacher_log_probs: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Proxy guidance: KL(teacher || student) over the old classes, mean over the batch.

    Source: ASG, the loss of the released training script (docs/original.md, section 1):
    (1/B) sum_b sum_c p_old (log p_old - log p_new), temperature 1. Zero at inner step 0, where
    student and teacher are the same network. At another temperature T both are softened,
    p ~ exp(z / T), and the result is multiplied by T**2, so that gradients keep their size
    (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network").

    Args:
        teacher_log_probs: Log-probabilities of the frozen teacher, shape (B, C_old).
        student_logits: The trained backbone through the frozen old head, shape (B, C_old).
        temperature: T, dimensionless, > 0.

    Returns:
        Scalar, in nats.
    """
    if temperature != 1.0:
        teacher_log_probs = F.log_softmax(teacher_log_probs / temperature, dim=1)
        student_logits = student_logits / temperature
    kl = F.kl_div(
        F.log_softmax(student_logits, dim=1),
        teacher_log_probs,
        log_target=True,
        reduction="batchmean",
    )
    return kl if temperature == 1.0 else kl * temperature**2


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Euclidean distance of each image's features, mean over the batch.

    Source: the feature distillation of ROAD (Chen, Li, Van Gool, CVPR 2018), one of ASG's
    baselines (docs/original.md, section 5), there on maps of a segmentation network.

    Args:
        student: Output of a layer of the trained backbone, shape (B, ...).
        teacher: The same layer's output in the frozen one, the same shape.
    """
    return (student - teacher).square().flatten(1).sum(dim=1).mean()


def squared_distance(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], scales: Sequence[Tensor] | None = None
) -> Tensor:
    """Sum over all weights of (s_k (w_k - a_k))**2; s = 1 if no scales are given.

    One node of the graph for all tensors, whose gradient 2 s_k**2 (w_k - a_k) is written down:
    recorded tensor by tensor it would cost more than a small network's backward pass.

    Args:
        parameters: w, the tensors that train.
        anchors: a, where they are held, the same shapes.
        scales: s, square roots of importances, the same shapes.
    """
    value: Tensor = _SquaredDistance.apply(list(anchors), scales and list(scales), *parameters)
    return value


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: list[Tensor], scales: list[Tensor] | None, *parameters: Tensor
    ) -> Tensor:
        moved = torch._foreach_sub(parameters, anchors)
        if scales is not None:
            torch._foreach_mul_(moved, scales)
        ctx.moved, ctx.scales = moved, scales
        return torch.stack(torch._foreach_norm(moved)).square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        slopes = torch._foreach_mul(ctx.moved, 2 * gradients[0])
        if ctx.scales is not None:
            torch._foreach_mul_(slopes, ctx.scales)
        return None, None, *slopes


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the new head, mean over the batch, in nats."""
    return F.cross_entropy(logits, labels)


def accuracy_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows are classified rightly, shape (B,), bool.

    A row with a score that is not finite is wrong: weights can be huge and still finite after the
    last window, and argmax would call such rows class 0.
    """
    return torch.eq(logits.argmax(dim=1), labels) & logits.isfinite().all(dim=1)
