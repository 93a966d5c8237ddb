import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from asg_env.core import evaluation
from asg_env.core.data import HostImages, Split
from asg_env.core.evaluation import Evaluation, evaluate_split, forward_all, recall_weights


def split_of(values, labels):
    """Images of one row: `values` of shape (N, W) become pixels of shape (N, 1, 1, W)."""
    images = torch.tensor(values, dtype=torch.uint8).view(len(values), 1, 1, -1)
    return Split(images, None if labels is None else torch.tensor(labels), 0.0, 1.0)


def one_hot(images):
    """A network that says of three classes the one that the first pixel names."""
    return F.one_hot(images[:, 0, 0, 0].long(), 3).float()


def sided(images):
    """A network that answers otherwise for the mirror image."""
    left_is_brighter = (images[:, 0, 0, 0] > images[:, 0, 0, 1])[:, None]
    return torch.where(left_is_brighter, torch.tensor([6.0, 0.0]), torch.tensor([-3.0, 1.0]))


# Predictions 0 0 1 2 | 1 0 | 2 for labels 0 0 0 0 | 1 1 | 2: recalls 1/2, 1/2 and 1.
UNBALANCED = split_of([[p] for p in (0, 0, 1, 2, 1, 0, 2)], [0, 0, 0, 0, 1, 1, 2])


def test_accuracy_and_mean_recall_on_an_unbalanced_split():
    result = evaluate_split(UNBALANCED, one_hot, flip_average=False)

    assert result.correct.tolist() == [True, True, False, False, True, False, True]
    assert result.accuracy == pytest.approx(4 / 7)
    assert result.mean_recall == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    logits = one_hot(UNBALANCED.images.float())
    assert result.loss == pytest.approx(F.cross_entropy(logits, UNBALANCED.labels).item())


def test_score_is_the_figure_that_is_asked_for():
    result = Evaluation(0.25, 0.5, 1.0, torch.tensor([True]), torch.tensor([0]), ())

    assert result.score("accuracy") == 0.25
    assert result.score("mean_recall") == 0.5


def test_recall_weights_give_every_class_the_same_say():
    weights = recall_weights(UNBALANCED.labels, 3)

    torch.testing.assert_close(weights, torch.tensor([1 / 12] * 4 + [1 / 6] * 2 + [1 / 3]))
    assert weights.sum().item() == pytest.approx(1)


def test_class_without_images_counts_as_recall_zero():
    data = split_of([[0], [0], [1]], [0, 0, 1])  # of three classes, all right

    result = evaluate_split(data, one_hot, flip_average=False)

    assert result.accuracy == 1.0
    assert result.mean_recall == pytest.approx(2 / 3)
    assert recall_weights(data.labels, 3).sum().item() == pytest.approx(2 / 3)


def test_flip_average_is_the_mean_of_the_sigmoids_and_not_of_the_logits():
    # Logits (6, 0), mirrored (-3, 1). Both the logits and their mean say 0, but the sigmoids
    # are (0.998 + 0.047) / 2 = 0.52 and (0.5 + 0.731) / 2 = 0.62: class 1.
    data = split_of([[9, 1]], [1])

    plain = evaluate_split(data, sided, flip_average=False)
    averaged = evaluate_split(data, sided, flip_average=True)

    assert (plain.accuracy, averaged.accuracy) == (0.0, 1.0)


def test_flip_average_does_not_depend_on_the_orientation():
    there, back = split_of([[9, 1]] * 2, [0, 1]), split_of([[1, 9]] * 2, [0, 1])

    averaged = [evaluate_split(data, sided, True).correct.tolist() for data in (there, back)]
    plain = [evaluate_split(data, sided, False).correct.tolist() for data in (there, back)]

    assert averaged[0] == averaged[1]
    assert plain[0] != plain[1]


def test_predictions_and_their_confidence():
    # Softmax of (6, 0) gives class 0 1 / (1 + e^-6), softmax of (-3, 1) class 1 1 / (1 + e^-4).
    result = evaluate_split(split_of([[9, 1], [1, 9]], [0, 0]), sided, flip_average=False)

    assert result.predicted.tolist() == [0, 1]
    assert result.predicted.dtype == torch.int64
    assert result.correct.tolist() == [True, False]
    assert result.confidence.tolist() == pytest.approx([0.997527, 0.982014], abs=1e-6)
    assert result.confidence.dtype == torch.float32
    assert result.confidence is result.confidence  # computed once


def test_confidence_under_flip_average_is_the_mean_softmax_of_the_class_of_the_sigmoids():
    # The sigmoids choose class 1; its softmax is 0.002473 for (6, 0) and 0.982014 for (-3, 1).
    result = evaluate_split(split_of([[9, 1], [1, 9]], [1, 1]), sided, flip_average=True)

    assert result.predicted.tolist() == [1, 1]
    assert result.confidence.tolist() == pytest.approx([(0.002473 + 0.982014) / 2] * 2, abs=1e-6)


def test_confidence_is_finite_for_huge_logits():
    huge = torch.tensor([[3e38, -3e38, 0.0]])
    data = split_of([[0]], [0])

    result = evaluate_split(data, lambda images: huge, flip_average=False)

    assert result.predicted.tolist() == [0]
    assert result.confidence.tolist() == [1.0]


def test_one_bad_mirror_image_is_enough_to_have_no_prediction():
    def broken(images):
        logits = sided(images)
        return torch.where(logits < 0, torch.tensor(float("nan")), logits)  # brighter on the right

    data = split_of([[9, 1]], [0])

    assert evaluate_split(data, broken, flip_average=False).predicted.tolist() == [0]
    assert evaluate_split(data, broken, flip_average=True).predicted.tolist() == [-1]


def test_loss_is_that_of_the_logits_of_the_images_as_they_are():
    data = split_of([[9, 1], [1, 9]], [0, 0])
    logits = torch.tensor([[6.0, 0.0], [-3.0, 1.0]])

    result = evaluate_split(data, sided, flip_average=True)

    assert result.loss == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-6)


@pytest.mark.parametrize("flip_average", [False, True])
@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_images_with_scores_that_are_not_finite_are_wrong(score, flip_average):
    data = split_of([[0], [1], [2]], [0, 1, 2])

    def broken(images):
        logits = one_hot(images)
        # Argmax would call it class 1, which is right.
        logits[1, 0 if score < 0 else 1] = score
        return logits

    result = evaluate_split(data, broken, flip_average)

    assert result.correct.tolist() == [True, False, True]
    assert result.accuracy == result.mean_recall == pytest.approx(2 / 3)
    assert result.predicted.tolist() == [0, -1, 2]
    of_the_right_class = math.e / (math.e + 2)  # softmax of logits 1, 0, 0
    assert result.confidence.tolist() == pytest.approx([of_the_right_class, 0, of_the_right_class])


@pytest.mark.parametrize("flip_average", [False, True])
def test_batches_do_not_matter(monkeypatch, flip_average):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 1, 2, 3), generator=generator, dtype=torch.uint8)
    data = Split(images, torch.arange(23) % 4, 128.0, 64.0)
    weight = torch.randn(6, 4, generator=generator)

    def linear(batch):
        sizes.append(len(batch))
        return batch.flatten(1) @ weight

    results = []
    for size in (512, 5, 1):
        sizes = []
        monkeypatch.setattr(evaluation, "LARGEST_BATCH", size)
        monkeypatch.setattr(evaluation, "SMALLEST_BATCH", size)
        results.append(evaluate_split(data, linear, flip_average))
        assert max(sizes) == min(size, 23)
        assert sum(sizes) == 23 * (1 + flip_average)

    whole = results[0]
    for result in results[1:]:
        assert torch.equal(result.correct, whole.correct)
        assert torch.equal(result.predicted, whole.predicted)
        torch.testing.assert_close(result.confidence, whole.confidence)
        for name in ("accuracy", "mean_recall", "loss"):
            assert getattr(result, name) == pytest.approx(getattr(whole, name))


@pytest.mark.parametrize("flip_average", [False, True])
def test_host_images_are_read_once_and_one_batch_ahead(monkeypatch, flip_average):
    monkeypatch.setattr(evaluation, "LARGEST_BATCH", 4)
    monkeypatch.setattr(evaluation, "SMALLEST_BATCH", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 2, 3)).astype(np.uint8)
    log, seen = [], []

    def read(rows):
        log.append(rows.tolist())
        return pixels[rows]

    def forward(images):
        host._reader.submit(lambda: None).result()  # until what was read ahead is there
        seen.append(len(log))
        return images[:, :, 0, 0] - images[:, :, 0, 1]

    host = HostImages(read, np.arange(10), (3, 1, 2), cheap=False)
    labels = torch.arange(10) % 3
    resident = Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, 0.0, 1.0)

    result = evaluate_split(Split(host, labels, 0.0, 1.0), forward, flip_average)

    assert log == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert seen[:: 1 + flip_average] == [2, 3, 3]
    expected = evaluate_split(resident, forward, flip_average)
    assert torch.equal(result.correct, expected.correct)
    assert result.loss == expected.loss


@pytest.mark.parametrize(("side", "batch"), [(1, 512), (16, 512), (20, 327), (224, 64)])
def test_batches_shrink_as_images_grow(side, batch):
    data = Split(
        torch.zeros(600, 1, 1, 1, dtype=torch.uint8).expand(600, 1, side, side), None, 0, 1
    )
    sizes = []

    forward_all(data, lambda images: sizes.append(len(images)) or images[:, 0, 0, :1])

    assert sizes[0] == batch
    assert sum(sizes) == 600


def test_split_without_labels_cannot_be_scored():
    with pytest.raises(ValueError, match=r"the images of this split have no labels"):
        evaluate_split(split_of([[0]], None), one_hot, flip_average=False)
