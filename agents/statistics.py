"""Statistics of the evaluation protocol, in NumPy."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean, its percentile interval, and how many units stand behind it."""

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
        Estimate with a percentile interval of `CONFIDENCE`.

    Raises:
        ValueError: `minus` has another shape than that.
    """
    seeds, instances, images = correct.shape
    if minus is not None and minus.shape not in ((1, instances, images), correct.shape):
        raise ValueError(
            f"`minus` must have the shape {correct.shape}, or that with one seed, got {minus.shape}"
        )
    strata = [np.arange(images)]
    if classes is not None:
        strata = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    shares = len(strata) if classes is None or count is None else count
    units = score(correct, classes, count)
    if minus is not None:
        units = units - score(minus, classes, count)
    value = float(interquartile_mean(units.reshape(-1)))
    draws = np.empty(RESAMPLES)
    block = 100  # resamples at a time: bounds the memory of the weight matrix
    for start in range(0, RESAMPLES, block):
        weights = np.empty((block, images))
        for rows in strata:
            n = len(rows)
            drawn = generator.multinomial(n, np.full(n, 1 / n), size=block)
            weights[:, rows] = drawn / (n * shares)
        left = _weighted(correct, weights)
        right = _weighted(minus, weights) if minus is not None else np.zeros((1, instances, 1))
        for index in range(block):
            seed_index = generator.integers(seeds, size=seeds)
            instance_index = generator.integers(instances, size=instances)
            resampled = left[seed_index][:, instance_index, index]
            other = right[seed_index if len(right) == seeds else np.zeros(1, dtype=int)]
            resampled = resampled - other[:, instance_index, min(index, other.shape[2] - 1)]
            draws[start + index] = interquartile_mean(resampled.reshape(-1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), seeds, instances)


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
    values: np.ndarray, generator: np.random.Generator, minus: np.ndarray | None = None
) -> Estimate | None:
    """IQM of a figure over (training seeds x instances), the interval as in `bootstrap_iqm`.

    Args:
        values: The figure of each training, shape (S, I). An instance where any is NaN is left out.
        generator: Source of the resamples.
        minus: If given, shape (1, I) or (S, I): the estimate is of the paired difference.

    Returns:
        The estimate, or None if no instance is left.
    """
    units = values if minus is None else values - minus
    units = units[:, ~np.isnan(units).any(axis=0)]
    seeds, instances = units.shape
    if instances == 0:
        return None
    draws = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        seed_index = generator.integers(seeds, size=seeds)
        instance_index = generator.integers(instances, size=instances)
        draws[index] = interquartile_mean(units[np.ix_(seed_index, instance_index)].reshape(-1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    value = float(interquartile_mean(units.reshape(-1)))
    return Estimate(value, float(low), float(high), seeds, instances)


def _weighted(correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over images, (S, I, B), for weights of shape (B, N)."""
    return np.asarray(correct.astype(np.float32) @ weights.T.astype(np.float32))
