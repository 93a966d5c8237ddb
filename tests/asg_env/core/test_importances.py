import math

import pytest
import torch

from asg_env.core.importances import EXACT_CLASSES, diagonal_fisher, path_importances

CURVATURES = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def descend(rate, steps, damping=0.0, start=START, **options):
    weight = start.clone().requires_grad_()
    (found,) = path_importances(
        [weight],
        lambda step: (CURVATURES * weight.square()).sum() / 2,
        torch.optim.SGD([weight], lr=rate, **options),
        steps,
        damping,
    )
    return found


def test_path_importances_equal_the_closed_form_of_gradient_descent_on_a_quadratic():
    rate, steps = 0.1, 7
    # w(t) = r**t w(0) with r = 1 - rate h, so omega = rate h**2 w(0)**2 sum_t r**(2t).
    r = 1 - rate * CURVATURES
    omega = rate * CURVATURES**2 * START**2 * (1 - r ** (2 * steps)) / (1 - r**2)
    moved = (r**steps - 1) ** 2 * START**2

    torch.testing.assert_close(descend(rate, steps), omega / moved)
    damped = omega / (moved + 0.3 * moved.mean())
    torch.testing.assert_close(descend(rate, steps, damping=0.3), damped)


def test_path_importances_are_half_the_curvature_on_a_slow_path_to_the_minimum():
    found = descend(rate=0.001, steps=30_000)

    torch.testing.assert_close(found, CURVATURES / 2, rtol=0.003, atol=0)


def test_path_importances_of_weights_that_raised_the_loss_or_stood_still_are_zero():
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    found = descend(0.01, 5, damping=0.1, start=start, maximize=True)

    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    images = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return weight, images


def test_diagonal_fisher_of_a_linear_model_is_the_analytic_one(linear):
    weight, images = linear
    p = (images @ weight.detach().T).softmax(dim=1)
    # d log p_y / d W_ck = (1[y = c] - p_c) x_k, and its expected square is p_c (1 - p_c) x_k**2.
    expected = ((p * (1 - p)).T @ images.square()) / len(images)

    (found,) = diagonal_fisher(
        [weight], lambda x: x @ weight.T, images, torch.Generator().manual_seed(0)
    )

    torch.testing.assert_close(found, expected)


def test_diagonal_fisher_draws_labels_where_there_are_many(linear):
    weight = torch.zeros(EXACT_CLASSES + 4, 2, dtype=torch.float64, requires_grad=True)
    images = torch.ones(3000, 2, dtype=torch.float64)
    share = 1 / len(weight)  # all classes alike

    (found,) = diagonal_fisher(
        [weight], lambda x: x @ weight.T, images, torch.Generator().manual_seed(0)
    )

    # The mean over weights: each draw gives (1 - p)**2 + (C - 1) p**2 in all, whatever was drawn.
    whole = (1 - share) ** 2 + (len(weight) - 1) * share**2
    assert found[:, 0].sum().item() == pytest.approx(whole)
    deviation = math.sqrt(share * (1 - share) / len(images))
    assert abs(found - share * (1 - share)).max().item() < 5 * deviation
