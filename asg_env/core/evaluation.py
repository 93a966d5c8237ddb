"""One pass over a split: predictions, accuracy, mean per-class recall, loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from asg_env.core.data import HostImages, Split
from asg_env.core.objectives import task_loss

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
        predicted: Class that is predicted per image, shape (N,), int64, on the CPU; -1, which is
            never right, where a score is not finite: argmax would call such images class 0.
        logits: Logits of the images and, with `flip_average`, of their mirror images; each of
            shape (N, C), float32, on the device, whose memory they hold.
    """

    accuracy: float
    mean_recall: float
    loss: float
    correct: Tensor
    predicted: Tensor
    logits: tuple[Tensor, ...]

    @cached_property
    def confidence(self) -> Tensor:
        """Softmax probability of the predicted class, shape (N,), float32, on the CPU.

        With `flip_average` the mean of that class's probabilities for an image and its mirror
        image, though the sigmoids chose the class. 0 where a score is not finite. Computed when
        first asked for: a pass after every env step should not pay for it.
        """
        winner = self.predicted.to(self.logits[0].device).clamp(min=0)[:, None]
        each = [logits.softmax(dim=1).gather(1, winner)[:, 0] for logits in self.logits]
        return torch.stack(each).mean(dim=0).cpu().where(self.predicted >= 0, 0)

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
    if flip_average:
        both = forward_all(data, lambda x: torch.stack((forward(x), forward(x.flip(3))), dim=1))
        passes = both.unbind(dim=1)
        scores = (passes[0].sigmoid() + passes[1].sigmoid()) / 2
        # The sigmoid of an infinite logit is finite.
        finite = _finite_rows(passes[0]) & _finite_rows(passes[1])
    else:
        scores = forward_all(data, forward)
        passes = (scores,)
        finite = _finite_rows(scores)
    logits = passes[0]
    predicted = scores.argmax(dim=1).where(finite, -1)
    correct = predicted == labels
    per_image = recall_weights(labels, logits.shape[1])
    numbers = torch.stack(
        (correct.float().mean(), (correct * per_image).sum(), task_loss(logits, labels))
    )
    accuracy, recall, loss = numbers.tolist()
    rows = torch.stack((correct, predicted)).cpu()  # one copy from the device for both
    return Evaluation(accuracy, recall, loss, rows[0].bool(), rows[1], passes)


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
    """Apply `forward` to a whole split, batch by batch, host images one batch ahead; (N, ...)."""
    height, width = data.images.shape[2:]
    batch = max(SMALLEST_BATCH, min(LARGEST_BATCH, PIXELS // (height * width)))
    parts = [slice(start, start + batch) for start in range(0, len(data), batch)]
    found = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        images = data.batch(part)
        if following is not None and isinstance(data.images, HostImages):
            data.images.prefetch(following)
        found.append(forward(images))
    return torch.cat(found)


def _finite_rows(logits: Tensor) -> Tensor:
    # A maximum hands on NaN; for few columns this takes half the time of isfinite().all(dim=1).
    return logits.abs().amax(dim=1).isfinite()
