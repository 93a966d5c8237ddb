import numpy as np
import pytest
from scipy import stats

from agents import statistics
from agents.statistics import bootstrap_iqm, bootstrap_values, interquartile_mean, score


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def images_without_noise(units: np.ndarray, images: int = 20) -> np.ndarray:
    """Right everywhere or nowhere, so that resampling images changes nothing; (S, I, N)."""
    return np.repeat(units[..., None].astype(bool), images, axis=-1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 40, 41])
def test_interquartile_mean_equals_scipys_trimmed_mean(count):
    values = rng(count).normal(size=count)
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


def test_interquartile_mean_reduces_the_axis_it_is_given():
    values = rng().normal(size=(6, 9))
    np.testing.assert_allclose(
        interquartile_mean(values, axis=0), stats.trim_mean(values, 0.25, axis=0)
    )


def test_interquartile_mean_ignores_one_wild_value():
    assert interquartile_mean(np.array([1.0, 1.0, 1.0, 1000.0])) == 1.0


@pytest.mark.parametrize("right", [True, False])
def test_bootstrap_has_zero_width_when_every_run_is_alike(right):
    estimate = bootstrap_iqm(np.full((2, 6, 30), right), rng())
    assert estimate.value == float(right)
    assert estimate.low == pytest.approx(float(right), abs=1e-5)
    assert estimate.high == pytest.approx(float(right), abs=1e-5)
    assert (estimate.seeds, estimate.instances) == (2, 6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_bootstrap_difference_of_a_method_with_itself_is_exactly_zero(seeds):
    correct = rng().random((seeds, 8, 50)) < 0.6
    estimate = bootstrap_iqm(correct, rng(1), minus=correct)
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_bootstrap_difference_is_paired_by_instance():
    # Instances differ widely, the second method is better by the same amount on each: paired,
    # the interval is narrow; unpaired it would span the instances.
    images = 100
    base = np.linspace(0.1, 0.8, 10)
    worse = np.arange(images) < (base[:, None] * images).round()
    better = np.arange(images) < ((base[:, None] + 0.1) * images).round()
    paired = bootstrap_iqm(better[None], rng(), minus=worse[None])
    alone = bootstrap_iqm(better[None], rng())
    assert paired.value == pytest.approx(0.1, abs=1e-6)
    assert 0 < paired.low < paired.high < 0.2
    assert alone.high - alone.low > 2 * (paired.high - paired.low)


def test_bootstrap_difference_takes_one_seed_of_the_other_side_against_many():
    correct = rng().random((3, 8, 50)) < 0.7
    other = rng(1).random((1, 8, 50)) < 0.5
    estimate = bootstrap_iqm(correct, rng(2), minus=other)
    units = correct.mean(axis=-1) - other.mean(axis=-1)
    assert estimate.value == pytest.approx(float(interquartile_mean(units.reshape(-1))), abs=1e-6)
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize("shape", [(2, 8, 50), (3, 7, 50), (3, 8, 49)])
def test_bootstrap_refuses_a_difference_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"`minus` must have the shape \(3, 8, 50\), or that with"):
        bootstrap_iqm(np.ones((3, 8, 50), dtype=bool), rng(), minus=np.ones(shape, dtype=bool))


def test_bootstrap_repeats_with_the_same_generator_and_differs_with_another():
    correct = rng().random((2, 10, 40)) < 0.6
    assert bootstrap_iqm(correct, rng(5)) == bootstrap_iqm(correct, rng(5))
    assert bootstrap_iqm(correct, rng(5)) != bootstrap_iqm(correct, rng(6))


def test_bootstrap_agrees_with_scipy_when_only_instances_vary():
    units = rng(3).random((1, 24)) < 0.6
    ours = bootstrap_iqm(images_without_noise(units), rng(4))
    theirs = stats.bootstrap(
        (units[0].astype(float),),
        lambda values, axis: stats.trim_mean(values, 0.25, axis=axis),
        method="percentile",
        n_resamples=4000,
        rng=rng(5),
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.09)
    assert ours.high == pytest.approx(theirs.high, abs=0.09)
    assert ours.high - ours.low > 0.3


def test_bootstrap_interval_widens_with_each_source_of_noise(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    shares = np.full((3, 12), 0.6)
    images = np.arange(50)[None, None] < (shares * 50)[..., None]  # image noise alone

    def width(correct: np.ndarray) -> float:
        estimate = bootstrap_iqm(correct, rng(7))
        return estimate.high - estimate.low

    by_instance = shares + np.linspace(-0.3, 0.3, 12)
    by_seed = by_instance + np.array([[-0.1], [0.0], [0.1]])
    widths = [
        width(images),
        width(np.arange(50)[None, None] < (by_instance * 50)[..., None]),
        width(np.arange(50)[None, None] < (by_seed * 50)[..., None]),
    ]
    assert 0 < widths[0]
    assert widths[0] < widths[1] < widths[2]


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    generator = rng(8)
    covered = 0
    for _ in range(100):
        means = np.clip(generator.normal(0.6, 0.1, size=24), 0, 1)  # symmetric: the IQM is .6
        correct = generator.random((1, 24, 60)) < means[:, None]
        estimate = bootstrap_iqm(correct, generator)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 85 <= covered <= 100


# Mean per-class recall

UNBALANCED = np.array([0, 0, 0, 0, 1, 1, 2])


def recalls_by_hand(correct: np.ndarray, classes: np.ndarray) -> float:
    """Mean over classes of the share that is right, for one run, shape (N,)."""
    return float(np.mean([correct[classes == label].mean() for label in sorted(set(classes))]))


def test_score_is_accuracy_or_mean_recall_of_each_run():
    # Run 0: recalls 2/4, 1/2 and 1; run 1: all wrong but the single image of class 2.
    correct = np.array([[[1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1]]], dtype=bool)

    np.testing.assert_allclose(score(correct, None), [[4 / 7, 1 / 7]])
    np.testing.assert_allclose(score(correct, UNBALANCED), [[(1 / 2 + 1 / 2 + 1) / 3, 1 / 3]])
    assert score(correct, UNBALANCED).shape == (1, 2)


def test_score_and_bootstrap_count_a_class_without_images_as_zero():
    correct = rng().random((2, 6, 7)) < 0.6
    present, all_classes = score(correct, UNBALANCED), score(correct, UNBALANCED, count=4)

    np.testing.assert_allclose(all_classes, present * 3 / 4)
    classes = np.repeat(UNBALANCED, 40)
    correct = rng().random((6, 12, len(classes))) < 0.6
    ours, theirs = (bootstrap_iqm(correct, rng(1), classes=classes, count=n) for n in (4, 3))
    assert ours.value == pytest.approx(theirs.value * 3 / 4)
    assert (ours.low, ours.high) == pytest.approx((theirs.low * 3 / 4, theirs.high * 3 / 4))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_score_does_not_depend_on_the_order_of_images(order):
    correct = rng().random((2, 3, 7)) < 0.5
    np.testing.assert_allclose(
        score(correct[..., order], UNBALANCED[order]), score(correct, UNBALANCED)
    )


def test_bootstrap_of_classes_estimates_the_iqm_of_mean_recall():
    correct = rng().random((2, 6, 7)) < 0.6
    by_hand = [[recalls_by_hand(run, UNBALANCED) for run in seed] for seed in correct]

    estimate = bootstrap_iqm(correct, rng(1), classes=UNBALANCED)

    assert estimate.value == pytest.approx(interquartile_mean(np.ravel(by_hand)))
    assert estimate.value != pytest.approx(bootstrap_iqm(correct, rng(1)).value)
    assert estimate.low < estimate.value < estimate.high
    assert (estimate.seeds, estimate.instances) == (2, 6)


def test_bootstrap_of_balanced_classes_estimates_the_accuracy():
    correct = rng().random((2, 8, 60)) < 0.7
    classes = np.arange(60) % 4

    by_class, plain = (
        bootstrap_iqm(correct, rng(1), classes=classes),
        bootstrap_iqm(correct, rng(1)),
    )

    assert by_class.value == pytest.approx(plain.value, abs=1e-12)
    assert by_class.low == pytest.approx(plain.low, abs=0.03)
    assert by_class.high == pytest.approx(plain.high, abs=0.03)


def test_bootstrap_of_one_class_is_that_of_the_accuracy():
    correct = rng().random((1, 8, 30)) < 0.7
    assert bootstrap_iqm(correct, rng(1), classes=np.zeros(30)) == bootstrap_iqm(correct, rng(1))


def test_bootstrap_draws_images_within_their_class():
    # Each class is wholly right or wholly wrong, the same in every run: drawn within classes
    # nothing varies; drawn from all images, the share of each class would.
    classes = np.repeat([0, 1], [40, 10])
    correct = np.broadcast_to(classes == 0, (1, 6, 50))

    by_class = bootstrap_iqm(correct, rng(), classes=classes)
    plain = bootstrap_iqm(correct, rng())

    assert by_class.value == 0.5
    assert by_class.low == pytest.approx(0.5, abs=1e-6)
    assert by_class.high == pytest.approx(0.5, abs=1e-6)
    assert plain.high - plain.low > 0.1


def test_bootstrap_difference_of_mean_recalls_is_paired():
    correct = rng().random((3, 8, 7)) < 0.7
    other = rng(1).random((3, 8, 7)) < 0.5
    units = score(correct, UNBALANCED) - score(other, UNBALANCED)

    estimate = bootstrap_iqm(correct, rng(2), minus=other, classes=UNBALANCED)
    itself = bootstrap_iqm(correct, rng(2), minus=correct, classes=UNBALANCED)

    assert estimate.value == pytest.approx(interquartile_mean(units.reshape(-1)))
    assert estimate.low < estimate.value < estimate.high
    assert (itself.value, itself.low, itself.high) == (0.0, 0.0, 0.0)


def test_bootstrap_interval_of_mean_recall_covers_the_truth(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    generator = rng(9)
    classes = np.repeat([0, 1, 2], [60, 20, 20])
    chances = np.array([0.9, 0.5, 0.4])[classes]  # mean recall 0.6, accuracy 0.72
    covered = 0
    for _ in range(100):
        shift = np.clip(generator.normal(0, 0.05, size=(1, 24, 1)), -0.1, 0.1)
        correct = generator.random((1, 24, 100)) < chances + shift
        estimate = bootstrap_iqm(correct, generator, classes=classes)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 85 <= covered <= 100


# Figures with one value per training

FIGURE = np.array([[0.1, 0.4, 0.5, 0.6, 0.7, 0.9, 0.2, 0.3]])


@pytest.fixture
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


@pytest.mark.usefixtures("_few_resamples")
@pytest.mark.parametrize("seeds", [1, 3])
def test_bootstrap_values_is_the_iqm_of_all_trainings(seeds):
    values = rng().normal(size=(seeds, 8))
    estimate = bootstrap_values(values, rng(1))
    assert estimate.value == pytest.approx(stats.trim_mean(values.reshape(-1), 0.25), abs=1e-12)
    assert estimate.low < estimate.value < estimate.high
    assert (estimate.seeds, estimate.instances) == (seeds, 8)


def test_bootstrap_values_agrees_with_scipy():
    values = rng(3).normal(size=(1, 24))
    ours = bootstrap_values(values, rng(4))
    theirs = stats.bootstrap(
        (values[0],),
        lambda sample, axis: stats.trim_mean(sample, 0.25, axis=axis),
        method="percentile",
        n_resamples=4000,
        rng=rng(5),
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.05)
    assert ours.high == pytest.approx(theirs.high, abs=0.05)
    assert ours.high - ours.low > 0.3


@pytest.mark.usefixtures("_few_resamples")
def test_bootstrap_values_pairs_differences_by_instance():
    estimate = bootstrap_values(FIGURE + 0.05, rng(), minus=FIGURE)
    assert estimate.value == pytest.approx(0.05)
    assert estimate.low == pytest.approx(0.05)
    assert estimate.high == pytest.approx(0.05)
    shuffled = bootstrap_values(FIGURE + 0.05, rng(), minus=FIGURE[:, ::-1])
    assert shuffled.high - shuffled.low > 0.1


@pytest.mark.usefixtures("_few_resamples")
def test_bootstrap_values_takes_one_seed_of_the_other_side_against_many():
    values = FIGURE + np.array([[0.1], [0.2], [0.3]])
    estimate = bootstrap_values(values, rng(), minus=FIGURE)
    # 8 differences each of .1, .2 and .3: the middle half is that of .2 and two of each other.
    assert estimate.value == pytest.approx(0.2)
    assert estimate.seeds == 3
    # Three seeds: as wide as Student's interval of two degrees of freedom, or a little wider.
    assert -0.1 < estimate.low < 0.0
    assert 0.4 < estimate.high < 0.5


@pytest.mark.usefixtures("_few_resamples")
def test_bootstrap_values_pairs_seeds_where_both_sides_have_as_many():
    values = FIGURE + np.array([[0.1], [0.2], [0.3]])
    itself = bootstrap_values(values, rng(), minus=values)
    assert (itself.value, itself.low, itself.high) == (0.0, 0.0, 0.0)


@pytest.mark.usefixtures("_few_resamples")
@pytest.mark.parametrize("missing", ["values", "minus"])
def test_bootstrap_values_leaves_out_an_instance_where_any_seed_has_no_value(missing):
    values = np.vstack([FIGURE, FIGURE + 0.1])
    minus = np.zeros_like(FIGURE)
    side = values if missing == "values" else minus
    side[-1, [0, 5]] = np.nan
    kept = [1, 2, 3, 4, 6, 7]
    estimate = bootstrap_values(values, rng(), minus=minus)
    assert estimate == bootstrap_values(values[:, kept], rng())
    assert estimate.instances == 6


@pytest.mark.parametrize("seeds", [1, 2])
def test_bootstrap_values_is_none_where_no_instance_is_left(seeds):
    values = np.full((seeds, 3), 0.5)
    values[0] = np.nan
    assert bootstrap_values(values, rng()) is None
    assert bootstrap_values(np.full((1, 3), 0.5), rng(), minus=values) is None


def test_bootstrap_values_keeps_the_interval_of_a_share_within_what_a_share_can_be():
    values = np.array([[0.0, 0.0, 0.9, 1.0, 1.0]])
    free, bounded = bootstrap_values(values, rng()), bootstrap_values(values, rng(), None, (0, 1))
    assert free.low < 0
    assert free.high > 1
    assert (bounded.value, bounded.low, bounded.high) == (free.value, 0, 1)
    taken = bootstrap_values(values, rng(), 1 - values, (0, 1))
    assert (taken.low, taken.high) == (-1, 1)


@pytest.mark.usefixtures("_few_resamples")
def test_bootstrap_values_repeats_with_the_same_generator_and_differs_with_another():
    assert bootstrap_values(FIGURE, rng(5)) == bootstrap_values(FIGURE, rng(5))
    assert bootstrap_values(FIGURE, rng(5)) != bootstrap_values(FIGURE, rng(6))


# The order of runs


@pytest.mark.usefixtures("_few_resamples")
@pytest.mark.parametrize("values", ["real", "few", "tied"])
def test_bootstrap_values_does_not_change_a_bit_when_runs_are_permuted(values):
    drawn = {
        "real": rng().random((4, 9)),
        "few": rng().integers(0, 3, size=(4, 9)) / 2,
        "tied": np.eye(9)[:4],
    }[values]
    minus = rng(1).random((4, 9)) if values == "real" else np.zeros((1, 9))
    estimate = bootstrap_values(drawn, rng(2), minus=minus)
    for seed in range(5):
        rows, columns = rng(seed).permutation(4), rng(seed + 50).permutation(9)
        other = minus[rows if len(minus) == 4 else [0]][:, columns]
        assert bootstrap_values(drawn[rows][:, columns], rng(2), minus=other) == estimate


@pytest.mark.usefixtures("_few_resamples")
@pytest.mark.parametrize("classes", [None, np.arange(30) % 3])
@pytest.mark.parametrize("others", [0, 1, 3])
def test_bootstrap_iqm_does_not_change_a_bit_when_runs_are_permuted(others, classes):
    correct = rng().random((3, 6, 30)) < 0.6
    minus = (rng(1).random((others, 6, 30)) < 0.5) if others else None
    estimate = bootstrap_iqm(correct, rng(2), minus, classes)
    assert estimate.low < estimate.high
    for seed in range(5):
        rows, columns = rng(seed).permutation(3), rng(seed + 50).permutation(6)
        other = None if minus is None else minus[rows if others == 3 else [0]][:, columns]
        permuted = np.asfortranarray(correct[rows][:, columns])
        assert bootstrap_iqm(permuted, rng(2), other, classes) == estimate


def test_bootstrap_leaves_the_global_generator_alone():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    bootstrap_values(FIGURE, rng())
    bootstrap_iqm(rng().random((2, 4, 10)) < 0.5, rng())
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
