import numpy as np
import pytest
import torch

from asg_env.core.objectives import (
    accuracy_counts,
    feature_distance,
    kl_to_teacher,
    squared_distance,
    task_loss,
)


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


def test_kl_to_teacher_at_another_temperature_equals_the_formula(logits):
    old, new = (log_softmax(values / 2.5) for values in logits)
    expected = 2.5**2 * (np.exp(old) * (old - new)).sum() / 4

    teacher = torch.from_numpy(log_softmax(logits[0]))
    kl = kl_to_teacher(teacher, torch.from_numpy(logits[1]), temperature=2.5)

    assert kl.item() == pytest.approx(expected, rel=1e-12)


def test_feature_distance_is_the_squared_distance_of_an_image_averaged_over_the_batch():
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])

    assert feature_distance(student, torch.zeros(2, 2, 2)).item() == (5.0 + 9.0) / 2


@pytest.mark.parametrize("scales", [None, [torch.tensor([2.0, 1.0]), torch.tensor([[3.0]])]])
def test_squared_distance_and_its_gradient_equal_the_formula(scales):
    weights = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([[0.5]])]
    weights[1].requires_grad_()
    anchors = [torch.tensor([0.0, 1.0]), torch.tensor([[0.0]])]

    value = squared_distance(weights, anchors, scales)
    (3 * value).backward()

    # By hand: moved (1, -3, .5); squared 1 + 9 + .25, or with the scales 4 + 9 + 2.25.
    assert value.item() == pytest.approx(10.25 if scales is None else 15.25)
    slopes = ([2.0, -6.0], [[1.0]]) if scales is None else ([8.0, -6.0], [[9.0]])
    for weight, slope in zip(weights, slopes, strict=True):
        torch.testing.assert_close(weight.grad, 3 * torch.tensor(slope))


def test_squared_distance_has_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights, anchors, scales = ([t] for t in tensors)
    weights[0].requires_grad_()

    assert torch.autograd.gradcheck(lambda w: squared_distance([w], anchors, scales), weights)


def test_squared_distance_at_the_anchor_has_no_slope():
    weight = torch.ones(3, requires_grad=True)
    squared_distance([weight], [torch.ones(3)]).backward()

    assert weight.grad.tolist() == [0.0, 0.0, 0.0]


def test_task_loss_equals_the_formula(logits):
    labels = np.array([0, 2, 1, 1])
    expected = -log_softmax(logits[0])[np.arange(4), labels].mean()

    loss = task_loss(torch.from_numpy(logits[0]), torch.from_numpy(labels))

    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_accuracy_counts_says_which_rows_are_right():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])

    assert accuracy_counts(logits, torch.tensor([1, 1, 1])).tolist() == [True, False, True]
