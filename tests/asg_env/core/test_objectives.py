import numpy as np
import pytest
import torch

from asg_env.core.objectives import accuracy_counts, kl_to_teacher, objective, task_loss


@pytest.fixture
def logits():
    generator = np.random.default_rng(0)
    return generator.normal(size=(4, 3)), generator.normal(size=(4, 3))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_kl_to_teacher_equals_the_formula(logits):
    old, new = map(log_softmax, logits)
    expected = (np.exp(old) * (old - new)).sum() / 4

    kl = kl_to_teacher(torch.from_numpy(old), torch.from_numpy(logits[1]))

    assert kl.item() == pytest.approx(expected, rel=1e-12)
    # The other direction, KL(student || teacher), is another number.
    assert kl.item() != pytest.approx((np.exp(new) * (new - old)).sum() / 4, rel=1e-3)


def test_kl_to_teacher_is_zero_when_student_and_teacher_agree(logits):
    old = torch.from_numpy(logits[0])

    assert kl_to_teacher(torch.log_softmax(old, dim=1), old + 3.0).item() == pytest.approx(0.0)


@pytest.mark.parametrize(("guidance", "total"), [({"kl": 0.5}, 3.5), ({"kl": 0.0}, 2.0), ({}, 2.0)])
def test_objective_adds_the_weighted_terms(guidance, total):
    assert objective(torch.tensor(2.0), torch.tensor(3.0), guidance).item() == total


def test_objective_ignores_a_term_of_weight_zero_that_is_not_finite():
    assert objective(torch.tensor(2.0), torch.tensor(float("nan")), {"kl": 0.0}).item() == 2.0


def test_task_loss_equals_the_formula(logits):
    labels = np.array([0, 2, 1, 1])
    expected = -log_softmax(logits[0])[np.arange(4), labels].mean()

    loss = task_loss(torch.from_numpy(logits[0]), torch.from_numpy(labels))

    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_accuracy_counts_says_which_rows_are_right():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])

    assert accuracy_counts(logits, torch.tensor([1, 1, 1])).tolist() == [True, False, True]
