from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import judgement
from agents.judgement import judge_network
from asg_env.build import build_trainer
from asg_env.core.metrics import expected_calibration_error, hyperspherical_energies

TASK = "ASG/Digits-v0"
CLASSES = 5


@pytest.fixture(scope="module")
def shared_trainer(make_settings):
    return build_trainer(TASK, make_settings())


@pytest.fixture
def trainer(shared_trainer):
    """A trainer of the digits after six inner steps."""
    shared_trainer.reset(head_seed=3, data_seed=4)
    shared_trainer.run(6, [0.1] * 5)
    return shared_trainer


@pytest.fixture
def labels(trainer):
    return trainer.splits["test"].known_labels()


def test_judgement_agrees_with_an_evaluation_of_the_trainer(trainer, labels):
    result = trainer.evaluate("test")
    judged = judge_network(trainer, diverged=False)
    assert judged.correct.dtype == bool
    np.testing.assert_array_equal(judged.correct, result.correct.numpy())
    assert judged.correct.mean() == pytest.approx(result.accuracy, abs=1e-6)
    assert judged.retention == trainer.retention() > 0.5
    assert judged.calibration_error == expected_calibration_error(result.confidence, result.correct)
    assert judged.energies == hyperspherical_energies(trainer.features("test", 9999))


def test_confusion_counts_true_classes_in_rows(trainer, labels):
    predicted = trainer.evaluate("test").predicted
    confusion = judge_network(trainer, diverged=False).confusion
    counted = np.zeros((CLASSES, CLASSES), dtype=int)
    for true, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        counted[true, guess] += 1
    np.testing.assert_array_equal(confusion, counted)
    assert not np.array_equal(counted, counted.T)


def test_energies_are_those_of_so_many_test_images(trainer, monkeypatch):
    monkeypatch.setattr(judgement, "ENERGY_IMAGES", 20)
    expected = hyperspherical_energies(trainer.features("test", 20))
    assert judge_network(trainer, diverged=False).energies == expected
    assert expected != hyperspherical_energies(trainer.features("test", 9999))


def test_energies_are_unknown_where_a_feature_is_not_finite(trainer, monkeypatch):
    features = trainer.features("test", 9999).clone()
    features[3, 2] = torch.inf
    monkeypatch.setattr(trainer, "features", lambda split, most: features)
    judged = judge_network(trainer, diverged=False)
    assert judged.energies is None
    assert judged.correct.any()


def test_judgement_after_divergence_is_all_zeros_or_unknown(trainer, labels, monkeypatch):
    def fail(*_):
        raise AssertionError("a diverged network was run")

    for name in ("evaluate", "features", "retention", "agreement"):
        monkeypatch.setattr(trainer, name, fail)
    judged = judge_network(trainer, diverged=True)
    assert judged.correct.shape == (len(labels),)
    assert not judged.correct.any()
    assert judged.confusion.shape == (CLASSES, CLASSES)
    assert not judged.confusion.any()
    assert (judged.calibration_error, judged.energies, judged.retention) == (None, None, 0.0)


def test_confusion_has_the_same_shape_after_divergence_where_a_class_has_no_test_image(
    trainer, monkeypatch
):
    test = trainer.splits["test"]
    kept = torch.nonzero(test.known_labels() < CLASSES - 1)[:, 0]
    fewer = replace(test, images=test.images[kept], labels=test.known_labels()[kept])
    monkeypatch.setitem(trainer.splits, "test", fewer)
    before, after = (judge_network(trainer, diverged).confusion for diverged in (False, True))
    assert before.shape == after.shape == (CLASSES, CLASSES)
    assert not before[CLASSES - 1].any()


def test_retention_is_unknown_without_images_of_the_old_task(trainer, monkeypatch):
    monkeypatch.delitem(trainer.splits, "old_task")
    assert [judge_network(trainer, diverged).retention for diverged in (False, True)] == [None] * 2
