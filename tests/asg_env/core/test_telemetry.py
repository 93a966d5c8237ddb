import math

import pytest
import torch

from asg_env.core.telemetry import WindowRecorder

# Two layer groups: the first holds a vector and a scalar, the second one vector.
INITIAL = [torch.tensor([3.0, 0.0]), torch.tensor(4.0), torch.tensor([0.0, 2.0])]
PREVIOUS = [torch.tensor([3.0, 0.0]), torch.tensor(8.0), torch.tensor([0.0, 2.0])]
NOW = [torch.tensor([6.0, 0.0]), torch.tensor(8.0), torch.tensor([0.0, 2.0])]
GRADIENTS = [torch.tensor([0.0, 1.0]), torch.tensor(2.0), torch.tensor([3.0, 4.0])]
STEPS = [torch.tensor(value) for value in (1.0, 0.2, 1.1, 0.0, 0.5, 3.0, 0.4, 3.3, 0.2, 0.7)]


def summary(steps=STEPS, weights=NOW, gradients=GRADIENTS, initial=INITIAL, previous=PREVIOUS):
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in initial]
    recorder = WindowRecorder([parameters[:2], parameters[2:]])

    def move_to(values):
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    recorder.start_training()
    move_to(previous)
    recorder.start_window()
    move_to(weights)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return recorder.report(steps)


def test_window_recorder_counts_a_missing_gradient_as_zero():
    parameter = torch.nn.Parameter(torch.ones(2))
    recorder = WindowRecorder([[parameter]])
    recorder.start_training()
    recorder.start_window()

    assert recorder.report(STEPS).grad_norms == (0.0,)


def test_window_recorder_reads_channels_last_weights():
    plain = torch.arange(24.0).reshape(2, 3, 2, 2)
    parameter = torch.nn.Parameter(plain.to(memory_format=torch.channels_last))
    recorder = WindowRecorder([[parameter]])
    recorder.start_training()
    recorder.start_window()
    with torch.no_grad():
        parameter.mul_(2)
    parameter.grad = plain.clone()

    report = recorder.report(STEPS)

    assert report.drifts == pytest.approx((1.0,))
    assert report.update_ratios == pytest.approx((0.5,))
    assert report.grad_norms == pytest.approx((plain.norm().item(),))


def test_window_recorder_averages_over_the_inner_steps():
    report = summary()

    values = (report.ce, report.kl, report.objective, report.head_mean, report.head_std)
    assert values == pytest.approx((2.0, 0.3, 2.2, 0.1, 0.6))


def test_window_recorder_gives_norms_per_layer_group():
    report = summary()

    assert report.grad_norms == pytest.approx((math.sqrt(5), 5.0))
    assert report.drifts == pytest.approx((1.0, 0.0))  # |(3, 0, 4)| / |(3, 0, 4)|
    assert report.update_ratios == pytest.approx((0.3, 0.0))  # |(3, 0, 0)| / |(6, 0, 8)|
    assert (report.diverged, report.cause) == (False, "")


def test_window_recorder_stays_finite_when_a_group_is_all_zero():
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
def test_window_recorder_names_the_cause_of_divergence(argument, cause, bad):
    values = {"steps": STEPS, "gradients": GRADIENTS, "weights": NOW}[argument]
    # One bad number suffices, wherever it stands.
    broken = [tensor.clone() for tensor in values]
    broken[1] = torch.full_like(broken[1], bad)

    report = summary(**{argument: broken})

    assert (report.diverged, report.cause) == (True, cause)
