"""Statistics of a benchmark: agents compared over training seeds, instances and suites.

After Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical
Precipice". Scores lie in [0, 1], higher is better, and a diverged run scores 0. An agent's scores
are one array of shape (S, I) for each suite (a stratum): S training seeds, each tested on the same
I instances. Units, the (seed, instance) pairs, are pooled over suites, so a suite with more of
them counts for more.

Each resample draws seeds and instances within every suite. That takes the trainings of different
suites to be independent; where one training is tested on several, put its instances side by side
in one array. Instead of the paper's percentile intervals all are `resampling.widened`, which
differ where seeds are few. Where all runs agree (all 1, or one agent always ahead) no resample
differs, and an interval of no width says only that. No permutation of seeds, or of instances in
all arrays that share them, changes any result.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agents import statistics
from agents.resampling import (
    canonical_order,
    crossed,
    draw_counts,
    leave_one_out,
    weighted_iqm,
    widened,
)

Strata = Sequence[np.ndarray]


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


def aggregate_iqm(scores: Strata, generator: np.random.Generator) -> Interval:
    """Interquartile mean of all units, with its stratified bootstrap interval.

    Args:
        scores: An array of shape (S, I) for each suite.
        generator: Source of the resamples.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    ordered = [_ordered(stratum)[0] for stratum in _checked(scores)]
    return _interval(_pooled_iqm(ordered), _sizes(ordered), generator, (0.0, 1.0))


def iqm_difference(scores: Strata, minus: Strata, generator: np.random.Generator) -> Interval:
    """Difference of two agents' interquartile means, paired by instance.

    Instances are drawn together, which takes out of the interval what is hard or easy for both.
    Seeds are drawn for each agent on its own, since trainings of different agents share nothing.

    Args:
        scores: An array of shape (S, I) for each suite.
        minus: The other agent's, shape (S', I) on the same instances.
        generator: Source of the resamples.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    pairs = _ordered_pairs(scores, minus)
    ours, theirs = (_pooled_iqm([pair[side] for pair in pairs]) for side in (0, 1))

    def difference(*counts: np.ndarray) -> np.ndarray:
        triples = _grouped(counts, 3)
        left = ours(*[c for seeds, _, instances in triples for c in (seeds, instances)])
        right = theirs(*[c for _, seeds, instances in triples for c in (seeds, instances)])
        return np.asarray(left - right)

    return _interval(difference, _pair_sizes(pairs), generator, (-1.0, 1.0))


def performance_profile(
    scores: Strata, thresholds: np.ndarray, generator: np.random.Generator
) -> Band:
    """Share of units with a score above each threshold.

    Args:
        scores: An array of shape (S, I) for each suite.
        thresholds: Shape (T,).
        generator: Source of the resamples.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    ordered = [_ordered(stratum)[0] for stratum in _checked(scores)]
    thresholds = np.asarray(thresholds, dtype=float)
    above = [stratum[..., None] > thresholds for stratum in ordered]
    value, low, high = _bounded(_pooled_mean(above), _sizes(ordered), generator, (0.0, 1.0))
    return Band(thresholds, value, low, high)


def optimality_gap(scores: Strata, generator: np.random.Generator, gamma: float = 1.0) -> Interval:
    """Mean over units of what they lack to `gamma`: max(gamma - score, 0); lower is better.

    Args:
        scores: An array of shape (S, I) for each suite.
        generator: Source of the resamples.
        gamma: The score beyond which no more is asked for, > 0.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    ordered = [_ordered(stratum)[0] for stratum in _checked(scores)]
    gaps = [np.maximum(gamma - stratum, 0.0) for stratum in ordered]
    return _interval(_pooled_mean(gaps), _sizes(ordered), generator, (0.0, gamma))


def probability_of_improvement(
    scores: Strata, others: Strata, generator: np.random.Generator
) -> Interval:
    """Chance that a training of one agent beats one of another on an instance, a tie being half.

    P(X > Y) + P(X = Y) / 2 over all pairs of seeds, which is U / (S S') of the Mann-Whitney test,
    for each instance; then the mean over instances, which weigh alike. As in `iqm_difference`
    instances are drawn together and seeds for each agent on its own.

    Args:
        scores: An array of shape (S, I) for each suite.
        others: The other agent's, shape (S', I) on the same instances.
        generator: Source of the resamples.

    Raises:
        ValueError: Scores are not of that shape, or not in [0, 1].
    """
    pairs = _ordered_pairs(scores, others)
    wins = []
    for ours, theirs in pairs:
        left, right = ours[:, None], theirs[None]
        wins.append((left > right) + 0.5 * (left == right))  # (S, S', I)

    def chance(*counts: np.ndarray) -> np.ndarray:
        total, weight = 0.0, 0.0
        for won, (ours, theirs, instances) in zip(wins, _grouped(counts, 3), strict=True):
            seeds = crossed(ours, theirs)
            by_instance = seeds @ won.reshape(-1, won.shape[-1]) / seeds.sum(1, keepdims=True)
            total = total + (by_instance * instances).sum(axis=1)
            weight = weight + instances.sum(axis=1)
        return np.asarray(total / weight)

    return _interval(chance, _pair_sizes(pairs), generator, (0.0, 1.0))


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


def _pooled_iqm(strata: Strata) -> Callable[..., np.ndarray]:
    """IQM of all units as a function of the counts of seeds and instances of each stratum."""
    units = np.concatenate([stratum.reshape(-1) for stratum in strata])

    def iqm(*counts: np.ndarray) -> np.ndarray:
        weights = [crossed(*pair) for pair in _grouped(counts, 2)]
        return weighted_iqm(units, np.concatenate(weights, axis=1))

    return iqm


def _pooled_mean(strata: Strata) -> Callable[..., np.ndarray]:
    """Mean over all units, of shape (S, I, ...) in each stratum, as a function of the counts."""
    units = np.concatenate([s.reshape(s.shape[0] * s.shape[1], *s.shape[2:]) for s in strata])

    def mean(*counts: np.ndarray) -> np.ndarray:
        weights = np.concatenate([crossed(*pair) for pair in _grouped(counts, 2)], axis=1)
        total = weights.sum(axis=1).reshape(-1, *[1] * (units.ndim - 1))
        return np.asarray(weights @ units.astype(float) / total)

    return mean


def _grouped(counts: Sequence[np.ndarray], size: int) -> list[tuple[np.ndarray, ...]]:
    """Counts of all factors, split by stratum."""
    return [tuple(counts[start : start + size]) for start in range(0, len(counts), size)]


def _sizes(strata: Strata) -> list[int]:
    return [n for stratum in strata for n in stratum.shape[:2]]


def _pair_sizes(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    return [n for ours, theirs in pairs for n in (len(ours), *theirs.shape)]


def _ordered(*agents: np.ndarray) -> list[np.ndarray]:
    """One stratum of each agent in canonical order, the instances in one order for all."""
    stacked = np.concatenate(agents)
    sides = np.repeat(np.arange(len(agents)), [len(agent) for agent in agents])
    rows, columns = canonical_order(stacked, sides)
    ordered = stacked[rows][:, columns]
    ends = np.cumsum([len(agent) for agent in agents])[:-1]
    return [np.ascontiguousarray(part) for part in np.split(ordered, ends)]


def _ordered_pairs(scores: Strata, others: Strata) -> list[tuple[np.ndarray, np.ndarray]]:
    ours, theirs = _checked(scores), _checked(others)
    if [s.shape[1] for s in ours] != [s.shape[1] for s in theirs]:
        raise ValueError(
            "both agents must have the same suites with the same instances, got "
            f"{[s.shape[1] for s in ours]} and {[s.shape[1] for s in theirs]} instances"
        )
    pairs = []
    for left, right in zip(ours, theirs, strict=True):
        first, second = _ordered(left, right)
        pairs.append((first, second))
    return pairs


def _checked(scores: Strata) -> list[np.ndarray]:
    strata: list[Any] = [np.asarray(stratum, dtype=float) for stratum in scores]
    shapes = [stratum.shape for stratum in strata]
    if not strata or any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise ValueError(
            "scores must be a list with an array of shape (seeds, instances) for each suite, none "
            f"empty, got shapes {shapes}"
        )
    for stratum in strata:
        _refuse_scores_outside(stratum)
    return strata


def _refuse_scores_outside(scores: np.ndarray) -> None:
    """Scores are accuracies; NaN is refused too."""
    if not ((scores >= 0) & (scores <= 1)).all():
        wrong = scores[~((scores >= 0) & (scores <= 1))].flat[0]
        raise ValueError(f"scores must be in [0, 1], a diverged run 0, got {wrong}")
