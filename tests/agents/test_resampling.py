import numpy as np
import pytest
from scipy import stats

from agents.resampling import (
    canonical_order,
    crossed,
    draw_counts,
    leave_one_out,
    weighted_iqm,
    widened,
)

NORMAL = stats.norm.ppf(0.975)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)


# Resamples


@pytest.mark.parametrize("count", [1, 4, 7, 24])
def test_weighted_iqm_equals_scipys_trimmed_mean_of_the_repeated_values(count):
    values = rng().normal(size=count)
    weights = draw_counts([count], 50, rng(1))[0]
    expected = [stats.trim_mean(np.repeat(values, row), 0.25) for row in weights]
    np.testing.assert_allclose(weighted_iqm(values, weights), expected, atol=1e-12)


def test_weighted_iqm_takes_values_that_differ_between_resamples():
    values = rng().normal(size=(30, 9))
    weights = draw_counts([9], 30, rng(1))[0]
    expected = [
        stats.trim_mean(np.repeat(row, times), 0.25)
        for row, times in zip(values, weights, strict=True)
    ]
    np.testing.assert_allclose(weighted_iqm(values, weights), expected, atol=1e-12)


def test_weighted_iqm_is_the_same_for_rows_of_different_totals():
    values = rng().normal(size=8)
    weights = np.ones((8, 8), dtype=int) - np.eye(8, dtype=int)
    expected = [stats.trim_mean(np.delete(values, i), 0.25) for i in range(8)]
    np.testing.assert_allclose(weighted_iqm(values, weights), expected, atol=1e-12)


def test_counts_draw_as_many_units_as_there_are():
    seeds, instances = draw_counts([3, 7], 100, rng())
    assert seeds.shape == (100, 3)
    assert (seeds.sum(axis=1) == 3).all()
    assert (instances.sum(axis=1) == 7).all()
    assert crossed(seeds, instances).shape == (100, 21)
    index = np.repeat(np.arange(3), seeds[0])
    columns = np.repeat(np.arange(7), instances[0])
    units = np.zeros((3, 7), dtype=int)
    np.add.at(units, np.ix_(index, columns), 1)
    np.testing.assert_array_equal(crossed(seeds, instances)[0], units.reshape(-1))


def test_leave_one_out_passes_over_factors_of_one_unit():
    values = rng().normal(size=5)
    without = leave_one_out(lambda _, counts: mean(values, counts), [1, 5])
    assert len(without) == 1
    np.testing.assert_allclose(without[0], [np.delete(values, i).mean() for i in range(5)])


# Canonical order


def matrices() -> dict[str, np.ndarray]:
    ring = np.eye(4, dtype=int) + np.roll(np.eye(4, dtype=int), 1, axis=1)
    rings = np.zeros((6, 6), dtype=int)  # refinement alone cannot tell its two rings apart
    rings[:2, :2], rings[2:, 2:] = 1, ring
    return {
        "real": rng().random((5, 12)),
        "one row": rng().random((1, 12)),
        "one value": np.ones((4, 10)),
        "mostly one value": np.where(rng().random((6, 9)) < 0.1, 0.5, 1.0),
        "two values": rng().integers(0, 2, size=(5, 7)),
        "each row its own zero": 1 - np.eye(6),
        "rings": rings,
    }


@pytest.mark.parametrize("name", matrices())
def test_canonical_order_makes_permuted_matrices_equal(name):
    cells = matrices()[name]
    rows, columns = canonical_order(cells)
    assert sorted(rows) == list(range(len(rows)))
    assert sorted(columns) == list(range(len(columns)))
    expected = cells[rows][:, columns]
    for seed in range(10):
        permuted = rng(seed).permutation(rng(seed + 50).permutation(cells), axis=1)
        rows, columns = canonical_order(permuted)
        np.testing.assert_array_equal(permuted[rows][:, columns], expected)


def test_canonical_order_of_all_small_matrices_of_two_values():
    for number in range(0, 2**12, 5):
        cells = np.array(list(np.binary_repr(number, 12)), dtype=int).reshape(3, 4)
        rows, columns = canonical_order(cells)
        expected = cells[rows][:, columns]
        permuted = rng(number).permutation(rng(number + 1).permutation(cells), axis=1)
        rows, columns = canonical_order(permuted)
        np.testing.assert_array_equal(permuted[rows][:, columns], expected)


def test_canonical_order_keeps_sides_apart_and_columns_together():
    left, right = rng().random((3, 8)), rng(1).random((4, 8)) / 100
    sides = np.array([0] * 3 + [1] * 4)
    rows, columns = canonical_order(np.concatenate([left, right]), sides)
    assert set(rows[:3]) == {0, 1, 2}
    order = rng(2).permutation(8)
    permuted = np.concatenate([rng(3).permutation(left)[:, order], right[::-1][:, order]])
    again, columns_again = canonical_order(permuted, sides)
    np.testing.assert_array_equal(
        permuted[again][:, columns_again], np.concatenate([left, right])[rows][:, columns]
    )


# Intervals


@pytest.mark.parametrize("count", [3, 12])
def test_widened_mean_of_one_factor_is_close_to_students_interval(count):
    values = rng().normal(size=count)
    draws = values.mean() + values.std() / np.sqrt(count) * rng(1).normal(size=200_000)
    without = leave_one_out(lambda counts: mean(values, counts), [count])
    low, high = widened(np.asarray(values.mean()), draws, without)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.02)


def test_widened_factor_of_two_factors_follows_its_formula():
    effects = [np.array([-0.2, 0.0, 0.5]), np.array([0.1, 0.3, -0.4, 0.0, 0.2])]
    without = [(effect.sum() - effect) / (len(effect) - 1) for effect in effects]
    draws = rng(1).normal(size=1001)
    wanted = present = 0.0
    for effect in effects:
        n = len(effect)
        variance = effect.var(ddof=1) / n
        wanted += stats.t.ppf(0.975, n - 1) ** 2 * variance
        present += NORMAL**2 * variance * (n - 1) / n
    low, high = widened(np.asarray(0.0), draws, without)
    ends = np.sqrt(wanted / present) * np.quantile(draws, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(ends), rel=1e-6)


def test_widened_is_the_percentile_interval_where_units_are_many():
    values = rng().normal(size=5000)
    draws = rng(1).normal(size=1000)
    without = leave_one_out(lambda counts: mean(values, counts), [5000])
    low, high = widened(np.asarray(0.0), draws, without)
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), rel=1e-3)


def test_widened_takes_the_rarest_factor_where_no_single_unit_matters():
    draws = np.linspace(-1, 1, 1001)
    low, high = widened(np.asarray(0.0), draws, [np.zeros(4), np.zeros(30)])
    factor = stats.t.ppf(0.975, 3) / NORMAL * np.sqrt(4 / 3)
    assert (low, high) == pytest.approx((-0.95 * factor, 0.95 * factor), rel=1e-6)


def test_widened_ends_stay_within_bounds_and_take_any_shape():
    draws = rng().normal(size=(500, 2))
    without = [rng(1).normal(size=(3, 2))]
    low, high = widened(np.array([0.1, 0.9]), draws, without, (0.0, 1.0))
    assert low.shape == high.shape == (2,)
    assert (low >= 0).all()
    assert (high <= 1).all()


def test_widened_alone_is_the_percentile_interval():
    draws = rng().normal(size=400)
    assert widened(np.asarray(0.0), draws, []) == pytest.approx(
        tuple(np.quantile(draws, [0.025, 0.975]))
    )
