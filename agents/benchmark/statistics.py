"""Statistics of a benchmark: agents compared over training seeds and instances.

After Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical
Precipice". Scores lie in [0, 1], higher is better, and a diverged run scores 0. An agent's scores
are an array of shape (S, I): S training seeds, each tested on the same I instances.

Each resample draws seeds, then instances. Where a suite has instances of several kinds (`strata`),
a resample holds as many of each kind as the suite does: how the suite was put together is no matter
of chance, and kinds may differ more than anything else does. Each kind is then a factor of its own,
like the seeds. Instead of the paper's percentile intervals all are `resampling.widened`, which
differ where seeds are few. Where all runs agree (all 1, or one agent
always ahead) no resample differs, and an interval of no width says only that. No permutation of
seeds, or of instances in all arrays that share them, changes any result.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from agents import statistics
from agents.resampling import (
    canonical_order,
    crossed,
    draw_counts,
    leave_one_out,
    ranks,
    weighted_iqm,
    widened,
)

Strata = Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class Interval:
    """A statistic and the interval of `resampling.CONFIDENCE` around it."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return what result files hold of it."""
        return asdict(self)


@dataclass(frozen=True)
class Band:
    """A curve with an interval at each point, which holds for that point alone; all shape (T,)."""

    at: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def to_dict(self) -> dict[str, list[float]]:
        """Return what result files hold of it."""
        lists: dict[str, list[float]] = {key: part.tolist() for key, part in vars(self).items()}
        return lists


def aggregate_iqm(
    scores: np.ndarray, generator: np.random.Generator, strata: Strata = None
) -> Interval:
    """Interquartile mean of all units, with its bootstrap interval.

    Args:
        scores: Shape (S, I).
        generator: Source of the resamples.
        strata: Kind of each instance, whole numbers, shape (I,). None: all are of one kind.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    (ordered,), kinds = _ordered(scores, strata=strata)
    return _interval(_iqm(ordered), [len(ordered), *kinds], generator, (0.0, 1.0))


def iqm_difference(
    scores: np.ndarray,
    minus: np.ndarray,
    generator: np.random.Generator,
    strata: Strata = None,
) -> Interval:
    """Difference of two agents' interquartile means, paired by instance.

    Instances are drawn together, which takes out of the interval what is hard or easy for both.
    Seeds are drawn for each agent on its own. Trainings with the same seed may draw the same train
    instances; drawing the seeds apart can only make the interval wider.

    Args:
        scores: Shape (S, I).
        minus: The other agent's, shape (S', I) on the same instances.
        generator: Source of the resamples.
        strata: Kind of each instance, whole numbers, shape (I,). None: all are of one kind.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    (ours, theirs), kinds = _ordered(scores, minus, strata=strata)
    left, right = _iqm(ours), _iqm(theirs)

    def difference(our: np.ndarray, their: np.ndarray, *instances: np.ndarray) -> np.ndarray:
        return np.asarray(left(our, *instances) - right(their, *instances))

    return _interval(difference, [len(ours), len(theirs), *kinds], generator, (-1.0, 1.0))


def performance_profile(
    scores: np.ndarray,
    thresholds: np.ndarray,
    generator: np.random.Generator,
    strata: Strata = None,
) -> Band:
    """Share of units with a score above each threshold.

    Args:
        scores: Shape (S, I).
        thresholds: Shape (T,).
        generator: Source of the resamples.
        strata: Kind of each instance, whole numbers, shape (I,). None: all are of one kind.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    (ordered,), kinds = _ordered(scores, strata=strata)
    thresholds = np.asarray(thresholds, dtype=float)
    above = _mean(ordered[..., None] > thresholds)
    value, low, high = _bounded(above, [len(ordered), *kinds], generator, (0.0, 1.0))
    return Band(thresholds, value, low, high)


def optimality_gap(
    scores: np.ndarray,
    generator: np.random.Generator,
    gamma: float = 1.0,
    strata: Strata = None,
) -> Interval:
    """Mean over units of what they lack to `gamma`: max(gamma - score, 0); lower is better.

    Args:
        scores: Shape (S, I).
        generator: Source of the resamples.
        strata: Kind of each instance, whole numbers, shape (I,). None: all are of one kind.
        gamma: The score beyond which no more is asked for, > 0.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    (ordered,), kinds = _ordered(scores, strata=strata)
    gap = _mean(np.maximum(gamma - ordered, 0.0))
    return _interval(gap, [len(ordered), *kinds], generator, (0.0, gamma))


def probability_of_improvement(
    scores: np.ndarray,
    others: np.ndarray,
    generator: np.random.Generator,
    strata: Strata = None,
) -> Interval:
    """Chance that a training of one agent beats one of another on an instance, a tie being half.

    P(X > Y) + P(X = Y) / 2 over all pairs of seeds, which is U / (S S') of the Mann-Whitney test,
    for each instance; then the mean over instances, which weigh alike. As in `iqm_difference`
    instances are drawn together and seeds for each agent on its own.

    Args:
        scores: Shape (S, I).
        others: The other agent's, shape (S', I) on the same instances.
        generator: Source of the resamples.
        strata: Kind of each instance, whole numbers, shape (I,). None: all are of one kind.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    (ours, theirs), kinds = _ordered(scores, others, strata=strata)
    left, right = ours[:, None], theirs[None]
    won = ((left > right) + 0.5 * (left == right)).reshape(-1, ours.shape[1])  # (S * S', I)

    def chance(our: np.ndarray, their: np.ndarray, *kinds_drawn: np.ndarray) -> np.ndarray:
        seeds, instances = crossed(our, their), np.concatenate(kinds_drawn, axis=1)
        by_instance = seeds @ won / seeds.sum(axis=1, keepdims=True)
        return np.asarray((by_instance * instances).sum(axis=1) / instances.sum(axis=1))

    return _interval(chance, [len(ours), len(theirs), *kinds], generator, (0.0, 1.0))


def sample_efficiency(
    budgets: Sequence[np.ndarray], scores: Sequence[np.ndarray], generator: np.random.Generator
) -> Band:
    """Interquartile mean over seeds at each budget.

    Seeds are aligned at every budget at which any of them was measured, from the first that all
    have reached to the last that all have: there a seed counts with its latest measurement, what
    one would have had on stopping then. Nothing is interpolated, and no seed is continued beyond
    its last measurement.

    Args:
        budgets: Inner steps at each measurement of each seed, ascending, shape (U,); U may differ.
        scores: The score of each, shape (U,).
        generator: Source of the resamples. All budgets share them.

    Raises:
        ValueError: Budgets and scores do not match, do not ascend or have no span in common, or
            scores are not in [0, 1].
    """
    if len(budgets) != len(scores) or not len(budgets):
        raise ValueError(
            f"`budgets` and `scores` must hold as many seeds, at least one, got {len(budgets)} "
            f"and {len(scores)}"
        )
    for steps, values in zip(budgets, scores, strict=True):
        if steps.shape != values.shape or steps.ndim != 1 or not steps.size:
            raise ValueError(
                "each seed must have one score for each of its budgets, at least one, got shapes "
                f"{values.shape} and {steps.shape}"
            )
        if not (np.diff(steps) > 0).all():
            raise ValueError(f"each seed's `budgets` must ascend, got {steps.tolist()}")
        _refuse_scores_outside(values)
    first, last = max(steps[0] for steps in budgets), min(steps[-1] for steps in budgets)
    if first > last:
        raise ValueError(
            f"seeds have no budget in common: one begins at {first}, another ends at {last}"
        )
    grid = np.unique(np.concatenate(budgets))
    grid = grid[(grid >= first) & (grid <= last)]
    aligned = np.array(
        [
            values[np.searchsorted(steps, grid, side="right") - 1]
            for steps, values in zip(budgets, scores, strict=True)
        ]
    )
    aligned = aligned[np.lexsort(aligned.T[::-1])]  # budgets have an order, seeds have none

    def at_each_budget(counts: np.ndarray) -> np.ndarray:
        return np.column_stack([weighted_iqm(column, counts) for column in aligned.T])

    value, low, high = _bounded(at_each_budget, [len(aligned)], generator, (0.0, 1.0))
    return Band(grid, value, low, high)


def _bounded(
    statistic: Callable[..., np.ndarray],
    sizes: Sequence[int],
    generator: np.random.Generator,
    bounds: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high end of a statistic of how often units are drawn."""
    value = statistic(*[np.ones((1, n), dtype=int) for n in sizes])[0]
    draws = statistic(*draw_counts(sizes, statistics.RESAMPLES, generator))
    return value, *widened(value, draws, leave_one_out(statistic, sizes), bounds)


def _interval(
    statistic: Callable[..., np.ndarray],
    sizes: Sequence[int],
    generator: np.random.Generator,
    bounds: tuple[float, float],
) -> Interval:
    value, low, high = _bounded(statistic, sizes, generator, bounds)
    return Interval(float(value), float(low), float(high))


def _iqm(units: np.ndarray) -> Callable[..., np.ndarray]:
    """IQM of units, (S, I), as a function of the counts of seeds and of each kind of instances."""
    flat = units.reshape(-1)
    return lambda seeds, *kinds: weighted_iqm(flat, crossed(seeds, np.concatenate(kinds, axis=1)))


def _mean(units: np.ndarray) -> Callable[..., np.ndarray]:
    """Mean over units, (S, I, ...), as a function of the counts that `_iqm` takes."""
    flat = units.reshape(-1, *units.shape[2:]).astype(float)

    def mean(seeds: np.ndarray, *kinds: np.ndarray) -> np.ndarray:
        weights = crossed(seeds, np.concatenate(kinds, axis=1))
        total = weights.sum(axis=1).reshape(-1, *[1] * (flat.ndim - 1))
        return np.asarray(weights @ flat / total)

    return mean


def _ordered(*agents: np.ndarray, strata: Strata) -> tuple[list[np.ndarray], list[int]]:
    """Bring the scores of each agent into canonical order, the instances in one order for all.

    Returns:
        The scores, checked, and how many instances there are of each kind, in their order.
    """
    checked = [np.asarray(scores, dtype=float) for scores in agents]
    for scores in checked:
        if scores.ndim != 2 or not scores.size:
            raise ValueError(
                "scores must be an array of shape (seeds, instances) that is not empty, got shape "
                f"{scores.shape}"
            )
        _refuse_scores_outside(scores)
    counts = [scores.shape[1] for scores in checked]
    if len(set(counts)) > 1:
        raise ValueError(f"both agents must have the same instances, got {counts}")
    kinds = np.zeros(counts[0], dtype=int) if strata is None else ranks(np.asarray(strata)[:, None])
    if len(kinds) != counts[0]:
        raise ValueError(f"`strata` must name the kind of {counts[0]} instances, got {len(kinds)}")
    sizes = [len(scores) for scores in checked]
    stacked = np.concatenate(checked)
    rows, columns = canonical_order(stacked, np.repeat(np.arange(len(sizes)), sizes), kinds)
    ordered = stacked[rows][:, columns]
    parts = [np.ascontiguousarray(part) for part in np.split(ordered, np.cumsum(sizes)[:-1])]
    return parts, np.bincount(kinds).tolist()


def _refuse_scores_outside(scores: np.ndarray) -> None:
    """Scores are accuracies; NaN is refused too."""
    if not ((scores >= 0) & (scores <= 1)).all():
        wrong = scores[~((scores >= 0) & (scores <= 1))].flat[0]
        raise ValueError(f"scores must be in [0, 1], a diverged run 0, got {wrong}")
