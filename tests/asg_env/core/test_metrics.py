import math

import pytest
import torch
import torch.nn.functional as F

from asg_env.core.data import Split
from asg_env.core.evaluation import evaluate_split
from asg_env.core.metrics import (
    LEAST_SQUARED_DISTANCE,
    confusion_matrix,
    expected_calibration_error,
    hyperspherical_energies,
    per_class_recall,
)

LENGTH = 100.0  # of feature vectors: 1e-4 beside 100^2 changes an energy by about 1e-8


@pytest.fixture
def features():
    return torch.randn(37, 5, generator=torch.Generator().manual_seed(0)) * LENGTH


def test_confusion_matrix_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 2, -1, 1, 0, -1])

    confusion = confusion_matrix(predicted, labels, 3)

    assert confusion.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert confusion.dtype == torch.int64
    assert per_class_recall(confusion, labels).tolist() == pytest.approx([1 / 3, 1 / 2, 0])


def test_confusion_matrix_of_no_images_is_zero():
    none = torch.zeros(0, dtype=torch.int64)

    assert confusion_matrix(none, none, 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([0, 3], [0, 1], r"`predicted` must be in \[-1, 2\] for 3 classes, got 3"),
        ([0, -2], [0, 1], r"`predicted` must be in \[-1, 2\] for 3 classes, got -2"),
        ([0, 1], [0, 3], r"`labels` must be in \[0, 2\] for 3 classes, got 3"),
        ([0, 1], [0, -1], r"`labels` must be in \[0, 2\] for 3 classes, got -1"),
    ],
)
def test_confusion_matrix_names_classes_out_of_range(predicted, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 3)


@pytest.mark.parametrize("flip_average", [False, True])
def test_mean_of_the_recalls_is_the_mean_recall_of_the_evaluation(flip_average):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 1, 1, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (200,), generator=generator)  # class 4 has no image
    weight = torch.randn(3, 5, generator=generator)

    def forward(batch):
        logits = batch.flatten(1) @ weight
        logits[::7] = float("nan")
        return logits

    result = evaluate_split(Split(images, labels, 128.0, 64.0), forward, flip_average)
    confusion = confusion_matrix(result.predicted, labels, 5)
    recalls = per_class_recall(confusion, labels)

    assert confusion.sum() == 200 - 29  # rows 0, 7, ..., 196 have no prediction
    assert recalls[4] == 0
    assert recalls.mean().item() == pytest.approx(result.mean_recall, abs=1e-6)
    assert confusion.diagonal().sum().item() / 200 == pytest.approx(result.accuracy)


def calibration_error(confidence, correct, **settings):
    return expected_calibration_error(
        torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool), **settings
    )


def test_calibration_error_is_zero_where_confidence_is_the_share_that_is_right():
    confidence = [0.75] * 4 + [0.5] * 2 + [1.0]
    correct = [1, 1, 1, 0] + [1, 0] + [1]

    assert calibration_error(confidence, correct) == 0


def test_calibration_error_of_one_who_is_always_sure_and_half_right():
    assert calibration_error([1.0] * 4, [1, 0, 1, 0]) == 0.5


def test_calibration_error_by_hand():
    # Bins of width 0.2. (0.2, 0.4]: confidence 0.3, right 1/2, gap 0.2, weight 2/5. (0.8, 1]:
    # confidence (0.85 + 0.95 + 0.9) / 3 = 0.9, right 1/3, gap 17/30, weight 3/5.
    error = calibration_error([0.25, 0.35, 0.85, 0.95, 0.9], [1, 0, 0, 0, 1], bins=5)

    assert error == pytest.approx(0.4 * 0.2 + 0.6 * 17 / 30, abs=1e-6)


def test_bins_of_the_calibration_error_own_their_upper_edges():
    # 0.2 and 0.1 share (0, 0.2]: |0.15 - 0.5|. Were 0.2 in the next bin: (0.8 + 0.1) / 2.
    assert calibration_error([0.2, 0.1], [1, 0], bins=5) == pytest.approx(0.35, abs=1e-6)
    # 0.2 and 0.3 do not share one: (0.8 + 0.3) / 2, and not |0.25 - 0.5|.
    assert calibration_error([0.2, 0.3], [1, 0], bins=5) == pytest.approx(0.55, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 3, 7, 10, 15])
def test_every_edge_is_in_the_bin_below_it(bins):
    # One image per bin, at its upper edge: no gap cancels another's.
    edges = torch.arange(1, bins + 1) / bins
    correct = torch.arange(bins) % 2 == 0

    error = expected_calibration_error(edges, correct, bins)

    assert error == pytest.approx((edges - correct.float()).abs().mean().item(), abs=1e-6)


def test_images_without_a_prediction_are_in_the_first_bin_of_the_calibration_error():
    # Confidences 0 and 0.04 in (0, 1/15], mean 0.02, half of them right.
    assert calibration_error([0.0, 0.04], [0, 1]) == pytest.approx(0.48, abs=1e-6)


@pytest.mark.parametrize(
    ("confidence", "bins", "message"),
    [
        ([], 15, r"the number of images must be >= 1, got 15 and 0"),
        ([0.5], 0, r"`bins` and the number of images must be >= 1, got 0 and 1"),
        ([0.5, 1.5], 15, r"`confidence` must be in \[0, 1\], got 1.5"),
        ([float("nan")], 15, r"`confidence` must be in \[0, 1\], got nan"),
    ],
)
def test_calibration_error_names_what_is_out_of_range(confidence, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_error(confidence, [1] * len(confidence), bins=bins)


def test_energies_of_orthogonal_vectors():
    energies = hyperspherical_energies(torch.eye(6) * LENGTH)

    assert energies == pytest.approx((-math.log(2), math.sqrt(0.5), 0.5), abs=1e-7)
    assert energies == pytest.approx((-0.6931, 0.7071, 0.5), abs=1e-4)


def test_energies_of_three_vectors_by_hand():
    # Right, up and left, of different lengths: squared distances 2, 4 and 2.
    energies = hyperspherical_energies(torch.tensor([[100.0, 0.0], [0.0, 300.0], [-200.0, 0.0]]))

    expected = (-4 * math.log(2) / 3, (2 / math.sqrt(2) + 1 / 2) / 3, 5 / 12)
    assert energies == pytest.approx(expected, abs=1e-7)


def test_offset_of_the_norm_by_hand():
    # Length 0.01 and 1e-4 under the root: cos = 1e-4 / 2e-4, which makes d^2 = 1.
    energies = hyperspherical_energies(torch.tensor([[0.01, 0.0]] * 2))

    assert energies == pytest.approx((0, 1, 1), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energies_agree_with_distances_of_pairs(features, dtype):
    distances = F.pdist(F.normalize(features.double()))
    expected = (-2 * distances.log().mean(), (1 / distances).mean(), (1 / distances**2).mean())

    energies = hyperspherical_energies(features.to(dtype))

    assert energies == pytest.approx([e.item() for e in expected], rel=1e-6)


@pytest.mark.parametrize("block", [1, 2, 10, 36, 37, 38])
def test_blocks_do_not_change_the_energies(features, block):
    whole = hyperspherical_energies(features)

    assert hyperspherical_energies(features, block) == pytest.approx(whole, rel=1e-12)


def test_energies_depend_on_neither_scale_nor_order(features):
    energies = hyperspherical_energies(features)
    scales = torch.arange(1, 38)[:, None]

    assert hyperspherical_energies(features * scales) == pytest.approx(energies, rel=1e-6)
    assert hyperspherical_energies(features.flip(0), block=10) == pytest.approx(energies)


def test_energies_fall_as_directions_spread(features):
    spread = hyperspherical_energies(features)
    narrow = hyperspherical_energies(features + 5 * LENGTH)

    assert all(a > b for a, b in zip(narrow, spread, strict=True))


def test_energies_of_collapsed_features_are_large_and_finite():
    energies = hyperspherical_energies(torch.full((5, 3), 1e6))

    least = LEAST_SQUARED_DISTANCE
    assert energies == pytest.approx((-math.log(least), least**-0.5, 1 / least))


def test_dead_features_look_orthogonal():
    assert hyperspherical_energies(torch.zeros(4, 3)) == pytest.approx(
        (-math.log(2), math.sqrt(0.5), 0.5)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_energies_of_features_that_are_not_finite_are_nan(features, value):
    features[3, 2] = value

    assert all(math.isnan(energy) for energy in hyperspherical_energies(features))


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_energies_need_a_matrix_of_two_rows(shape):
    with pytest.raises(ValueError, match=r"`features` must have shape \(N, D\) with N >= 2, got"):
        hyperspherical_energies(torch.zeros(shape))
