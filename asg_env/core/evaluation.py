"""One pass over a split: which images are right, accuracy, mean per-class recall, loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asg_env.core.data import Split
from asg_env.core.objectives import accuracy_counts, task_loss

Metric = Literal["accuracy", "mean_recall"]

# Images per forward pass: the more pixels an image has, the fewer, which bounds the memory.
LARGEST_BATCH, SMALLEST_BATCH, PIXELS = 512, 64, 2**17


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split.

    Attributes:
        accuracy: Share of images classified rightly by the head that was asked.
        mean_recall: Mean over classes of the share of the class's images classified rightly.
        loss: Cross-entropy of that head, mean over images, nats.
        correct: Per image, shape (N,), bool, on the CPU.
    """

    accuracy: float
    mean_recall: float
    loss: float
    correct: Tensor

    def score(self, metric: Metric) -> float:
        """Return the figure called `metric`."""
        return self.accuracy if metric == "accuracy" else self.mean_recall


def evaluate_split(
    data: Split, forward: Callable[[Tensor], Tensor], flip_average: bool
) -> Evaluation:
    """Score a network on a labelled split.

    Args:
        data: Images and labels.
        forward: From normalised images to logits, (B, C), float32.
        flip_average: Classify by the mean of the sigmoids for an image and its mirror image, as
            the original did on VisDA-17 (docs/original.md, section 4); else by the logits.

    Raises:
        ValueError: The split has no labels.
    """
    labels = data.known_labels()
    logits = forward_all(data, forward)
    if flip_average:
        mirrored = forward_all(data, lambda images: forward(images.flip(3)))
        scores = (logits.sigmoid() + mirrored.sigmoid()) / 2
        # The sigmoid of an infinite logit is finite.
        finite = (logits.isfinite() & mirrored.isfinite()).all(dim=1)
        correct = accuracy_counts(scores, labels) & finite
    else:
        correct = accuracy_counts(logits, labels)
    per_image = recall_weights(labels, logits.shape[1])
    numbers = torch.stack(
        (correct.float().mean(), (correct * per_image).sum(), task_loss(logits, labels))
    )
    accuracy, recall, loss = numbers.tolist()
    return Evaluation(accuracy, recall, loss, correct.cpu())


def recall_weights(labels: Tensor, classes: int) -> Tensor:
    """Weight of each image in the mean per-class recall, 1 / (classes * images of its class).

    A class without images counts as a recall of 0, as in the original (docs/original.md,
    section 4).

    Args:
        labels: int64, shape (N,).
        classes: Number of classes, C.

    Returns:
        Shape (N,), float32; it sums to 1 where every class has images.
    """
    counts = torch.bincount(labels, minlength=classes)
    return 1 / (classes * counts[labels].float())


def forward_all(data: Split, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `forward` to a whole split, batch by batch; shape (N, C)."""
    height, width = data.images.shape[2:]
    batch = max(SMALLEST_BATCH, min(LARGEST_BATCH, PIXELS // (height * width)))
    parts = [slice(start, start + batch) for start in range(0, len(data), batch)]
    return torch.cat([forward(data.batch(part)) for part in parts])
