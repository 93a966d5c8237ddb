"""Statistics of the evaluation protocol, in NumPy."""

from dataclasses import dataclass

import numpy as np

from agents.resampling import (
    canonical_order,
    crossed,
    draw_counts,
    leave_one_out,
    ranks,
    weighted_iqm,
    widened,
)

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean, its widened interval, and how many units stand behind it."""

    value: float
    low: float
    high: float
    seeds: int
    instances: int

    def to_dict(self) -> dict[str, float]:
        """Return what result files hold of it."""
        return {
            "iqm": self.value,
            "low": self.low,
            "high": self.high,
            "seeds": self.seeds,
            "instances": self.instances,
        }


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half: the lowest and highest quarter are dropped.

    A quarter that is not a whole number of values is rounded down, as in scipy's trimmed mean.

    Args:
        values: At least one value along `axis`.
        axis: The axis that is reduced.
    """
    ordered = np.sort(values, axis=axis)
    count = ordered.shape[axis]
    cut = int(count * 0.25)
    middle: np.ndarray = np.take(ordered, np.arange(cut, count - cut), axis=axis)
    return np.asarray(middle.mean(axis=axis))


def bootstrap_iqm(
    correct: np.ndarray,
    generator: np.random.Generator,
    minus: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    count: int | None = None,
) -> Estimate:
    """IQM over (training seeds x instances) with an interval from a hierarchical bootstrap.

    Each resample draws seeds, then instances, then test images, all with replacement. Instances
    and images are common to all seeds and, for a difference, to both sides, so they are drawn
    together: differences are paired by instance and image.

    Args:
        correct: Which test images are classified rightly, bool, shape (S, I, N) for S training
            seeds, I instances and N images. A diverged run is all False.
        generator: Source of the resamples.
        minus: If given, shape (S', I, N): the estimate is of the difference
            accuracy(correct) - accuracy(minus) per (seed, instance). S' may be 1 or S; with S
            the seeds are drawn together.
        classes: If given, each image's class, shape (N,): the figure of a (seed, instance) is
            the mean per-class recall instead of the accuracy, and images are drawn within their
            class.
        count: See `score`.

    Returns:
        Estimate with a `widened` interval of `CONFIDENCE`; no permutation of seeds or instances
        changes it.

    Raises:
        ValueError: `minus` has another shape than that.
    """
    seeds, instances, images = correct.shape
    if minus is not None and minus.shape not in ((1, instances, images), correct.shape):
        raise ValueError(
            f"`minus` must have the shape {correct.shape}, or that with one seed, got {minus.shape}"
        )
    other = np.zeros_like(correct[:1]) if minus is None else minus
    runs = np.concatenate([correct, np.broadcast_to(other, correct.shape)], axis=-1)
    content = np.packbits(runs.reshape(seeds * instances, -1), axis=1)
    rows, columns = canonical_order(ranks(content).reshape(seeds, instances))
    correct = np.ascontiguousarray(correct[rows][:, columns])
    other = np.ascontiguousarray(other[rows if len(other) == seeds else [0]][:, columns])

    strata = [np.arange(images)]
    if classes is not None:
        strata = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    shares = len(strata) if classes is None or count is None else count
    units = score(correct, classes, count) - score(other, classes, count)
    draws = np.empty(RESAMPLES)
    block = 100  # resamples at a time: bounds the memory of the weight matrix
    for start in range(0, len(draws), block):
        size = min(block, len(draws) - start)
        weights = np.empty((size, images))
        for stratum in strata:
            n = len(stratum)
            weights[:, stratum] = draw_counts([n], size, generator)[0] / (n * shares)
        resampled = _weighted(correct, weights) - _weighted(other, weights)
        draws[start : start + size] = weighted_iqm(
            resampled.reshape(seeds * instances, size).T,
            crossed(*draw_counts(units.shape, size, generator)),
        )
    without = [
        _without_each_image(correct[..., stratum], other[..., stratum], units, shares)
        for stratum in strata
        if len(stratum) > 1
    ]
    return _estimate(units, draws, without, (-1.0 if minus is not None else 0.0, 1.0))


def score(correct: np.ndarray, classes: np.ndarray | None, count: int | None = None) -> np.ndarray:
    """Accuracy of each (seed, instance), or mean per-class recall, shape (S, I).

    Args:
        correct: Bool, shape (S, I, N).
        classes: Each image's class, shape (N,), for the mean per-class recall.
        count: Number of classes; those without images count as a recall of 0, as in
            `asg_env.core.evaluation`. If left out, all have images.
    """
    if classes is None:
        return np.asarray(correct.mean(axis=-1))
    recalls = [correct[..., classes == label].mean(axis=-1) for label in np.unique(classes)]
    return np.asarray(np.sum(recalls, axis=0) / (len(recalls) if count is None else count))


def bootstrap_values(
    values: np.ndarray,
    generator: np.random.Generator,
    minus: np.ndarray | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate | None:
    """IQM of a figure over (training seeds x instances), the interval as in `bootstrap_iqm`.

    Args:
        values: The figure of each training, shape (S, I). An instance where any is NaN is left out.
        generator: Source of the resamples.
        minus: If given, shape (1, I) or (S, I): the estimate is of the paired difference.
        bounds: Least and largest value that the figure can take.

    Returns:
        The estimate, or None if no instance is left.
    """
    units = values if minus is None else values - minus
    units = units[:, ~np.isnan(units).any(axis=0)]
    if units.size == 0:
        return None
    rows, columns = canonical_order(units)
    units = np.ascontiguousarray(units[rows][:, columns])
    counts = draw_counts(units.shape, RESAMPLES, generator)
    low, high = bounds
    bounds = bounds if minus is None else (low - high, high - low)
    return _estimate(units, weighted_iqm(units.reshape(-1), crossed(*counts)), [], bounds)


def _estimate(
    units: np.ndarray,
    draws: np.ndarray,
    without: list[np.ndarray],
    bounds: tuple[float, float],
) -> Estimate:
    """IQM of units of shape (S, I) with the interval that their resamples give.

    `without` holds the IQM without each unit of any factor beside seeds and instances.
    """
    flat = units.reshape(-1)
    by_run = leave_one_out(lambda *counts: weighted_iqm(flat, crossed(*counts)), units.shape)
    value = interquartile_mean(flat)
    low, high = widened(value, draws, [*by_run, *without], bounds)
    return Estimate(float(value), float(low), float(high), *units.shape)


def _without_each_image(
    correct: np.ndarray, other: np.ndarray, units: np.ndarray, shares: int
) -> np.ndarray:
    """IQM without each image of a class of n, shape (n,), where each class counts 1 / shares."""
    rights = correct.astype(float) - other
    n = rights.shape[-1]
    change = (rights.mean(axis=-1, keepdims=True) - rights) / ((n - 1) * shares)
    left = (units[..., None] + change).reshape(-1, n).T
    return weighted_iqm(left, np.ones(left.shape, dtype=int))


def _weighted(correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over images, (S, I, B), for weights of shape (B, N)."""
    return np.asarray(correct.astype(np.float32) @ weights.T.astype(np.float32))
