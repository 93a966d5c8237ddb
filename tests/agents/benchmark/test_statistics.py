import re

import numpy as np
import pytest
from scipy import stats

from agents import statistics
from agents.benchmark.statistics import (
    Interval,
    aggregate_iqm,
    iqm_difference,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
)
from agents.resampling import canonical_order, draw_counts, widened
from benchmarks.interval_coverage import EFFECTS, SHAPES, candidates, latent, true_iqm

BUDGETS = np.array([0, 100, 200, 300])


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def agent(seed: int = 0, low: float = 0.0) -> np.ndarray:
    """Five seeds on eight instances."""
    return low + (1 - low) * rng(seed).random((5, 8))


def correlated(lead: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two agents on instances that differ widely; the first is ahead by as much on each."""
    generator = rng(seed)
    base = np.linspace(0.1, 0.8, 12)
    return (
        base + lead + 0.01 * generator.random((5, 12)),
        base + 0.01 * generator.random((4, 12)),
    )


def ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


# Values


def test_aggregate_is_the_trimmed_mean_of_all_units():
    scores = agent()
    interval = aggregate_iqm(scores, rng(1))
    assert interval.value == pytest.approx(stats.trim_mean(scores, 0.25, axis=None), abs=1e-12)
    assert 0 < interval.low < interval.value < interval.high < 1


def test_aggregate_interval_comes_from_the_same_resamples_as_a_direct_computation():
    scores = agent()
    rows, columns = canonical_order(scores)
    ordered = scores[rows][:, columns]
    seeds, instances = draw_counts((5, 8), 400, rng(1))
    draws = [
        stats.trim_mean(
            ordered[np.repeat(np.arange(5), s)][:, np.repeat(np.arange(8), i)].reshape(-1), 0.25
        )
        for s, i in zip(seeds, instances, strict=True)
    ]
    without = [
        np.array([stats.trim_mean(np.delete(ordered, i, axis).reshape(-1), 0.25) for i in range(n)])
        for axis, n in enumerate((5, 8))
    ]
    expected = widened(stats.trim_mean(ordered.reshape(-1), 0.25), np.array(draws), without)
    interval = aggregate_iqm(scores, rng(1))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_aggregate_of_independent_units_is_scipys_percentile_interval_made_wider(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 4000)
    units = rng(3).random((1, 24))
    theirs = stats.bootstrap(
        (units[0],),
        lambda values, axis: stats.trim_mean(values, 0.25, axis=axis),
        method="percentile",
        n_resamples=4000,
        rng=rng(5),
    ).confidence_interval
    ours = aggregate_iqm(units, rng(4))
    factor = stats.t.ppf(0.975, 23) / stats.norm.ppf(0.975) * np.sqrt(24 / 23)
    assert ours.low == pytest.approx(ours.value - factor * (ours.value - theirs.low), abs=0.02)
    assert ours.high == pytest.approx(ours.value + factor * (theirs.high - ours.value), abs=0.02)


def test_difference_is_that_of_the_two_aggregates():
    ours, theirs = agent(0, low=0.4), agent(1)
    interval = iqm_difference(ours, theirs, rng())
    left, right = (aggregate_iqm(side, rng()).value for side in (ours, theirs))
    assert interval.value == pytest.approx(left - right)
    opposite = iqm_difference(theirs, ours, rng())
    assert opposite.value == pytest.approx(-interval.value)


def test_difference_paired_by_instance_is_narrower_than_unpaired():
    ours, theirs = correlated(0.1)
    paired = iqm_difference(ours, theirs, rng())
    left, right = aggregate_iqm(ours, rng()), aggregate_iqm(theirs, rng(1))
    unpaired = np.hypot(left.high - left.low, right.high - right.low)
    assert paired.value == pytest.approx(0.1, abs=0.01)
    assert paired.low > 0.05  # and each alone spans the instances:
    assert 5 * (paired.high - paired.low) < unpaired


def test_difference_loses_its_pairing_with_instances_in_another_order():
    ours, theirs = correlated(0.1)
    paired = iqm_difference(ours, theirs, rng())
    shuffled = iqm_difference(ours, theirs[:, ::-1], rng())
    assert shuffled.value == pytest.approx(paired.value)
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_profile_is_the_share_of_units_above_each_threshold():
    scores = np.array([[0.0, 0.2, 0.4, 0.6], [0.2, 0.4, 0.6, 1.0]])
    band = performance_profile(scores, np.array([0.0, 0.2, 0.5, 1.0]), rng())
    np.testing.assert_allclose(band.value, [7 / 8, 5 / 8, 3 / 8, 0])
    np.testing.assert_array_equal(band.at, [0.0, 0.2, 0.5, 1.0])
    assert (band.low <= band.value).all()
    assert (band.value <= band.high).all()


def test_profile_falls_from_one_to_zero():
    scores = agent(low=0.1)
    band = performance_profile(scores, np.linspace(0, 1, 21), rng())
    np.testing.assert_allclose(band.value, [(scores > t).mean() for t in band.at])
    assert (np.diff(band.value) <= 0).all()
    assert (band.value[0], band.value[-1]) == (1.0, 0.0)


def test_gap_is_the_mean_lack():
    scores = np.array([[0.2, 0.6, 1.0], [0.4, 0.8, 0.0]])
    assert optimality_gap(scores, rng()).value == pytest.approx(0.5)
    assert optimality_gap(scores, rng(), gamma=0.5).value == pytest.approx((0.3 + 0.1 + 0.5) / 6)


def test_gap_interval_agrees_with_scipys_where_instances_are_many(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 4000)
    scores = rng().random((1, 200))
    interval = optimality_gap(scores, rng(1))
    theirs = stats.bootstrap((1 - scores[0],), np.mean, method="percentile", rng=rng(2))
    assert interval.low == pytest.approx(theirs.confidence_interval.low, abs=0.005)
    assert interval.high == pytest.approx(theirs.confidence_interval.high, abs=0.005)


def test_improvement_is_the_mean_of_mann_whitneys_statistic():
    ours, theirs = agent(0).round(1), agent(1)[:3].round(1)
    chances = [
        stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
        for x, y in zip(ours.T, theirs.T, strict=True)
    ]
    interval = probability_of_improvement(ours, theirs, rng())
    assert interval.value == pytest.approx(np.mean(chances))
    assert interval.low < interval.value < interval.high
    opposite = probability_of_improvement(theirs, ours, rng())
    assert opposite.value == pytest.approx(1 - interval.value)


def test_improvement_over_itself_is_one_half_and_over_the_worse_one():
    scores, worse = rng().random((3, 5)), np.zeros((2, 5))
    assert probability_of_improvement(scores, scores, rng()).value == 0.5
    assert ends(probability_of_improvement(scores, worse, rng())) == (1.0, 1.0, 1.0)
    assert ends(probability_of_improvement(worse, worse, rng())) == (0.5, 0.5, 0.5)


# All intervals


def test_runs_that_are_all_alike_give_no_width():
    scores = np.full((3, 4), 0.7)
    assert ends(aggregate_iqm(scores, rng())) == pytest.approx((0.7, 0.7, 0.7))
    assert ends(optimality_gap(scores, rng())) == pytest.approx((0.3, 0.3, 0.3))
    assert ends(iqm_difference(scores, scores, rng())) == pytest.approx((0, 0, 0))


def test_interval_widens_where_seeds_differ():
    by_instance = np.linspace(0.3, 0.6, 10) + np.zeros((4, 1))
    by_seed = by_instance + np.array([[-0.1], [0.0], [0.05], [0.1]])
    widths = [
        interval.high - interval.low
        for interval in (aggregate_iqm(s, rng()) for s in (by_instance, by_seed))
    ]
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize("few", [False, True], ids=["real", "few values"])
@pytest.mark.parametrize("seed", range(4))
def test_permuting_runs_changes_not_a_bit(few, seed):
    ours, theirs = agent(0), agent(1)[:3]
    if few:
        ours, theirs = ours.round(), theirs.round()
    generator = rng(seed)
    columns = generator.permutation(8)
    a, b = (generator.permutation(side)[:, columns] for side in (ours, theirs))
    assert aggregate_iqm(a, rng(2)) == aggregate_iqm(ours, rng(2))
    assert optimality_gap(a, rng(2)) == optimality_gap(ours, rng(2))
    assert iqm_difference(a, b, rng(2)) == iqm_difference(ours, theirs, rng(2))
    assert probability_of_improvement(a, b, rng(2)) == (
        probability_of_improvement(ours, theirs, rng(2))
    )
    thresholds = np.linspace(0, 1, 7)
    before = performance_profile(ours, thresholds, rng(2)).to_dict()
    assert performance_profile(a, thresholds, rng(2)).to_dict() == before


def test_draws_come_from_the_given_generator_alone():
    scores = agent()
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert aggregate_iqm(scores, rng(1)) == aggregate_iqm(scores, rng(1))
    assert aggregate_iqm(scores, rng(1)) != aggregate_iqm(scores, rng(2))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_interval_holds_the_truth_about_as_often_as_it_says():
    generator, covered = rng(8), 0
    for _ in range(100):
        effects = generator.normal(0, 0.07, size=(5, 1)) + generator.normal(0, 0.05, size=(1, 12))
        scores = np.clip(0.6 + effects + generator.normal(0, 0.05, size=(5, 12)), 0, 1)
        interval = aggregate_iqm(scores, generator)
        covered += interval.low <= 0.6 <= interval.high
    assert 89 <= covered <= 100


# The simulation of coverage


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("effects", EFFECTS.values(), ids=EFFECTS)
def test_simulated_scores_have_the_true_iqm(shape, effects):
    uniform = stats.norm.cdf(latent((1500, 1500), effects, rng(1)))
    scores = SHAPES[shape](uniform)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert stats.trim_mean(scores, 0.25, axis=None) == pytest.approx(
        true_iqm(SHAPES[shape]), abs=0.02
    )


def test_simulation_judges_the_interval_in_use():
    units = agent()
    rows, columns = canonical_order(units)
    interval = aggregate_iqm(units, rng(1))
    found = candidates(units[rows][:, columns], 400, rng(1))
    assert found["used"] == pytest.approx((interval.low, interval.high), abs=1e-12)


# Sample efficiency


def test_curve_is_the_iqm_over_seeds_at_each_budget():
    scores = rng().random((5, 4))
    band = sample_efficiency([BUDGETS] * 5, list(scores), rng(1))
    np.testing.assert_array_equal(band.at, BUDGETS)
    np.testing.assert_allclose(band.value, stats.trim_mean(scores, 0.25, axis=0))
    assert (band.low <= band.value).all()
    assert (band.value <= band.high).all()


def test_seeds_of_unequal_length_are_aligned_by_their_latest_measurement():
    budgets = [np.array([0, 100, 200]), np.array([50, 150, 250, 350])]
    scores = [np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7, 0.8])]
    band = sample_efficiency(budgets, scores, rng())
    # From 50, which both have reached, to 200, beyond which only one goes.
    np.testing.assert_array_equal(band.at, [50, 100, 150, 200])
    np.testing.assert_allclose(band.value, [0.3, 0.35, 0.4, 0.45])


def test_order_of_seeds_does_not_change_a_curve():
    budgets = [BUDGETS, BUDGETS[:3], BUDGETS + 10]
    scores = [rng(i).random(len(b)).round(1) for i, b in enumerate(budgets)]
    band = sample_efficiency(budgets, scores, rng(1)).to_dict()
    again = [2, 0, 1]
    assert (
        sample_efficiency([budgets[i] for i in again], [scores[i] for i in again], rng(1)).to_dict()
        == band
    )


# Errors


@pytest.mark.parametrize("shape", [(0,), (3,), (0, 3), (2, 0), (1, 2, 3)])
def test_scores_of_other_shapes_are_refused(shape):
    message = rf"of shape \(seeds, instances\) that is not empty, got shape {re.escape(str(shape))}"
    for call in (
        lambda scores: aggregate_iqm(scores, rng()),
        lambda scores: optimality_gap(scores, rng()),
        lambda scores: performance_profile(scores, np.zeros(1), rng()),
        lambda scores: iqm_difference(agent(), scores, rng()),
    ):
        with pytest.raises(ValueError, match=message):
            call(np.zeros(shape))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, 85.0, np.nan])
def test_scores_outside_the_unit_interval_are_refused(wrong):
    scores = np.full((2, 3), 0.5)
    scores[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], a diverged run 0, got {wrong}"):
        optimality_gap(scores, rng())
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        sample_efficiency([np.arange(3)] * 2, list(scores), rng())


@pytest.mark.parametrize("statistic", [iqm_difference, probability_of_improvement])
def test_agents_on_different_instances_are_refused(statistic):
    with pytest.raises(ValueError, match=r"must have the same instances, got \[8, 7\]"):
        statistic(agent(), agent()[:, 1:], rng())


@pytest.mark.parametrize(
    ("budgets", "scores", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([BUDGETS], [], "as many seeds, at least one, got 1 and 0"),
        ([BUDGETS], [np.zeros(3)], r"one score for each of its budgets.*\(3,\) and \(4,\)"),
        ([BUDGETS[:0]], [np.zeros(0)], "at least one, got shapes"),
        ([np.array([0, 2, 2])], [np.zeros(3)], r"must ascend, got \[0, 2, 2\]"),
        (
            [np.array([0, 1]), np.array([5, 6])],
            [np.zeros(2), np.zeros(2)],
            "no budget in common: one begins at 5, another ends at 1",
        ),
    ],
)
def test_curves_that_do_not_match_are_refused(budgets, scores, message):
    with pytest.raises(ValueError, match=message):
        sample_efficiency(budgets, scores, rng())


# Instances of several kinds


def of_two_kinds(kinds=(0.2, 0.6), seeds=4, each=5, noise=0.0):
    """Scores of instances of two kinds, in turns, and the kinds."""
    strata = np.tile([0, 1], each)
    scores = np.array(kinds)[strata] + noise * rng(3).random((seeds, 2 * each))
    return scores, strata


def every_interval(scores, others, strata):
    yield aggregate_iqm(scores, rng(1), strata)
    yield optimality_gap(scores, rng(1), 1.0, strata)
    yield iqm_difference(scores, others, rng(1), strata)
    yield probability_of_improvement(scores, others, rng(1), strata)


def test_what_kinds_differ_by_is_no_part_of_an_interval():
    scores, strata = of_two_kinds()
    for interval in every_interval(scores, scores / 2, strata):
        assert interval.low == pytest.approx(interval.high, abs=1e-12)
    drawn_too = aggregate_iqm(scores, rng(1))
    assert drawn_too.high - drawn_too.low > 0.1
    band = performance_profile(scores, np.array([0.1, 0.4, 0.9]), rng(1), strata)
    np.testing.assert_allclose([band.low, band.high], [[1, 0.5, 0], [1, 0.5, 0]], atol=1e-12)


def test_one_kind_is_as_none():
    scores, _ = of_two_kinds(noise=0.3)
    left = every_interval(scores, scores / 2, None)
    right = every_interval(scores, scores / 2, [7] * 10)
    assert list(map(ends, left)) == list(map(ends, right))


def test_stratified_interval_comes_from_the_same_resamples_as_a_direct_computation():
    scores, strata = of_two_kinds(noise=0.3)
    rows, columns = canonical_order(scores, strata=strata)
    ordered = scores[rows][:, columns]
    counts = draw_counts((4, 5, 5), 400, rng(1))

    def trimmed(seeds, first, second):
        drawn = np.repeat(np.arange(10), [*first, *second])
        return stats.trim_mean(ordered[np.repeat(np.arange(4), seeds)][:, drawn].reshape(-1), 0.25)

    draws = np.array([trimmed(*drawn) for drawn in zip(*counts, strict=True)])
    once = [np.ones(n, dtype=int) for n in (4, 5, 5)]
    without = [
        np.array(
            [
                trimmed(*(c - (np.arange(len(c)) == i) * (k == f) for k, c in enumerate(once)))
                for i in range(len(once[f]))
            ]
        )
        for f in range(3)
    ]
    expected = widened(trimmed(*once), draws, without)
    interval = aggregate_iqm(scores, rng(1), strata)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_permuting_instances_with_their_kinds_changes_nothing():
    scores, strata = of_two_kinds(noise=0.3)
    order = rng(5).permutation(10)
    left = every_interval(scores, scores**2, strata)
    right = every_interval(scores[::-1][:, order], (scores**2)[:, order], strata[order])
    assert list(map(ends, left)) == list(map(ends, right))


def test_kinds_of_other_instances_are_refused():
    with pytest.raises(ValueError, match="`strata` must name the kind of 8 instances, got 3"):
        aggregate_iqm(agent(), rng(), [0, 1, 1])
