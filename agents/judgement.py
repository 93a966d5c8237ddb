"""What a trained network is worth: figures on the test split and on the old task."""

from dataclasses import dataclass

import numpy as np

from asg_env.core.metrics import (
    confusion_matrix,
    expected_calibration_error,
    hyperspherical_energies,
)
from asg_env.core.trainer import Trainer

ENERGY_IMAGES = 2000  # test images whose features enter the hyperspherical energy: the first ones


@dataclass(frozen=True)
class Judgement:
    """Figures of one trained network; after divergence all zero, or None where zero would be good.

    Attributes:
        correct: Per test image, bool, shape (N,).
        confusion: Test images by true class (row) and predicted class (column), (C, C).
        calibration_error: Expected calibration error on test images, 15 bins.
        energies: Hyperspherical energy for s = 0, 1, 2 of the features of test images.
        retention: See `Trainer.retention`.
    """

    correct: np.ndarray
    confusion: np.ndarray
    calibration_error: float | None
    energies: tuple[float, float, float] | None
    retention: float | None


def judge_network(trainer: Trainer, diverged: bool) -> Judgement:
    """Judge the network as it stands. Reads the test split: nothing may be chosen by the result."""
    labels = trainer.splits["test"].known_labels()
    classes = int(labels.max()) + 1
    if diverged:
        wrong = np.zeros(len(labels), dtype=bool)
        return Judgement(wrong, np.zeros((classes, classes), dtype=int), None, None, 0.0)
    result = trainer.evaluate("test")
    classes = max(classes, trainer.optimizee.head_weight().shape[0])
    energies = hyperspherical_energies(trainer.features("test")[:ENERGY_IMAGES])
    return Judgement(
        result.correct.numpy(),
        confusion_matrix(result.predicted, labels, classes).cpu().numpy(),
        expected_calibration_error(result.confidence, result.correct),
        energies if np.isfinite(energies).all() else None,
        trainer.retention(),
    )
