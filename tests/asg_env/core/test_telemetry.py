import math

import pytest
import torch

from asg_env.core.telemetry import group_norms, summarise_window

# Two layer groups: the first holds a vector and a scalar, the second one vector.
OWNERS = torch.tensor([0, 0, 1])
INITIAL = [torch.tensor([3.0, 0.0]), torch.tensor(4.0), torch.tensor([0.0, 2.0])]
PREVIOUS = [torch.tensor([3.0, 0.0]), torch.tensor(8.0), torch.tensor([0.0, 2.0])]
NOW = [torch.tensor([6.0, 0.0]), torch.tensor(8.0), torch.tensor([0.0, 2.0])]
GRADIENTS = [torch.tensor([0.0, 1.0]), torch.tensor(2.0), torch.tensor([3.0, 4.0])]
STEPS = [torch.tensor(value) for value in (1.0, 0.2, 1.1, 0.0, 0.5, 3.0, 0.4, 3.3, 0.2, 0.7)]


def summary(**changed):
    arguments = {
        "steps": STEPS,
        "owners": OWNERS,
        "groups": 2,
        "weights": NOW,
        "gradients": GRADIENTS,
        "initial": INITIAL,
        "previous": PREVIOUS,
    }
    return summarise_window(**(arguments | changed))


def test_group_norms_joins_the_tensors_of_a_group():
    norms = group_norms([*NOW, *GRADIENTS], OWNERS, 2)

    torch.testing.assert_close(norms, torch.tensor([[10.0, 2.0], [math.sqrt(5), 5.0]]))


def test_summarise_window_averages_over_the_inner_steps():
    report = summary()

    values = (report.ce, report.kl, report.objective, report.head_mean, report.head_std)
    assert values == pytest.approx((2.0, 0.3, 2.2, 0.1, 0.6))


def test_summarise_window_gives_norms_per_layer_group():
    report = summary()

    assert report.grad_norms == pytest.approx((math.sqrt(5), 5.0))
    assert report.drifts == pytest.approx((1.0, 0.0))  # |(3, 0, 4)| / |(3, 0, 4)|
    assert report.update_ratios == pytest.approx((0.3, 0.0))  # |(3, 0, 0)| / |(6, 0, 8)|
    assert (report.diverged, report.cause) == (False, "")


def test_summarise_window_stays_finite_when_a_group_is_all_zero():
    zeros = [torch.zeros(2), torch.tensor(0.0), torch.zeros(2)]

    report = summary(weights=zeros, gradients=zeros, initial=zeros, previous=zeros)

    assert report.drifts == report.update_ratios == report.grad_norms == (0.0, 0.0)
    assert not report.diverged


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("argument", "cause"),
    [
        ("steps", "a training loss is not finite"),
        ("gradients", "a gradient norm is not finite"),
        ("weights", "a weight is not finite"),
    ],
)
def test_summarise_window_names_the_cause_of_divergence(argument, cause, bad):
    values = {"steps": STEPS, "gradients": GRADIENTS, "weights": NOW}[argument]
    # One bad number suffices, wherever it stands.
    broken = [tensor.clone() for tensor in values]
    broken[1] = torch.full_like(broken[1], bad)

    report = summary(**{argument: broken})

    assert (report.diverged, report.cause) == (True, cause)
