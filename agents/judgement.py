"""What a trained network is worth: figures on the test split and on the old task.

The only module that puts a network through the test split.
"""

from dataclasses import dataclass

import numpy as np

from asg_env.core.metrics import (
    confusion_matrix,
    expected_calibration_error,
    hyperspherical_energies,
    per_class_recall,
)
from asg_env.core.trainer import Trainer

ENERGY_IMAGES = 2000  # at most so many test images enter the hyperspherical energy


@dataclass(frozen=True)
class Judgement:
    """Figures of one trained network; after divergence all zero, or None where zero would be good.

    Attributes:
        correct: Per test image, bool, shape (N,).
        recalls: Per class, the share of its test images that is right, (C,).
        confusion: Test images by true class (row) and predicted class (column), (C, C).
        calibration_error: Expected calibration error on test images, 15 bins.
        energies: Hyperspherical energy for s = 0, 1, 2 of the features of test images.
        retention: See `retention_of`.
    """

    correct: np.ndarray
    recalls: np.ndarray
    confusion: np.ndarray
    calibration_error: float | None
    energies: tuple[float, float, float] | None
    retention: float | None


def judge_network(trainer: Trainer, diverged: bool) -> Judgement:
    """Judge the network as it stands. Reads the test split: nothing may be chosen by the result."""
    labels = trainer.splits["test"].known_labels()
    classes = trainer.optimizee.head_weight().shape[0]
    retention = retention_of(trainer, diverged)
    if diverged:
        nothing = np.zeros((classes, classes), dtype=int)
        wrong = np.zeros(len(labels), dtype=bool)
        return Judgement(wrong, np.zeros(classes), nothing, None, None, retention)
    result = trainer.evaluate("test")
    confusion = confusion_matrix(result.predicted, labels, classes)
    energies = hyperspherical_energies(trainer.features("test", ENERGY_IMAGES))
    return Judgement(
        result.correct.numpy(),
        per_class_recall(confusion, labels).numpy(),
        confusion.numpy(),
        expected_calibration_error(result.confidence, result.correct),
        energies if np.isfinite(energies).all() else None,
        retention,
    )


def test_network(trainer: Trainer, diverged: bool) -> tuple[np.ndarray, float, float | None]:
    """Return which test images are right, (N,), mean per-class recall, and retention.

    After divergence no image is right.
    """
    retention = retention_of(trainer, diverged)
    if diverged:
        return np.zeros(len(trainer.splits["test"]), dtype=bool), 0.0, retention
    result = trainer.evaluate("test")
    return result.correct.numpy(), result.mean_recall, retention


def retention_of(trainer: Trainer, diverged: bool) -> float | None:
    """Return `Trainer.retention`, 0 after divergence; None where it cannot be measured."""
    if diverged and "old_task" in trainer.splits:
        return 0.0
    return trainer.retention()
