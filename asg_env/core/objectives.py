"""What an inner step minimises: the task loss plus weighted guidance terms."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

GUIDANCE_TERMS = ("kl",)


def kl_to_teacher(teacher_log_probs: Tensor, student_logits: Tensor) -> Tensor:
    """Proxy guidance: KL(teacher || student) over the old classes, mean over the batch.

    Source: ASG, the loss of the released training script (docs/original.md, section 1):
    (1/B) sum_b sum_c p_old (log p_old - log p_new), temperature 1. Zero at inner step 0, where
    student and teacher are the same network.

    Args:
        teacher_log_probs: Log-probabilities of the frozen teacher, shape (B, C_old).
        student_logits: The trained backbone through the frozen old head, shape (B, C_old).

    Returns:
        Scalar, in nats.
    """
    return F.kl_div(
        F.log_softmax(student_logits, dim=1),
        teacher_log_probs,
        log_target=True,
        reduction="batchmean",
    )


def objective(ce: Tensor, kl: Tensor, guidance: Mapping[str, float]) -> Tensor:
    """CE + weight x KL: the loss whose gradient an inner step follows."""
    weight = guidance.get("kl", 0.0)
    return ce + weight * kl if weight else ce


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the new head, mean over the batch, in nats."""
    return F.cross_entropy(logits, labels)


def accuracy_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows are classified rightly, shape (B,), bool.

    A row with a score that is not finite is wrong: weights can be huge and still finite after the
    last window, and argmax would call such rows class 0.
    """
    return torch.eq(logits.argmax(dim=1), labels) & logits.isfinite().all(dim=1)
