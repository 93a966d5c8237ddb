import pytest
import torch
from torch import nn

from asg_env.core.telemetry import WindowRecorder


def noise_and_descent(curvature, rate, momentum, steps, noise):
    """Alignments of windows of `steps` on curvature / 2 |w|**2 with noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.ones(2000))
    recorder = WindowRecorder([[weight]])
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=momentum)
    recorder.start_training()
    found = []
    for _ in range(12):
        recorder.start_window()
        for step in range(steps):
            drawn = torch.randn(2000, generator=generator)
            weight.grad = curvature * weight.detach() + noise * drawn
            if step == steps - 1:
                recorder.mark()
            optimizer.step()
        found.append(recorder.report([torch.zeros(())] * 5 * steps).alignments[0])
    return found


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (1, 0.9), (10, 0.0), (10, 0.9)])
def test_alignment_of_pure_noise_is_nothing(steps, momentum):
    found = noise_and_descent(0.0, 0.01, momentum, steps, noise=1.0)

    assert max(abs(value) for value in found) < 0.1  # one over the root of 2000 is .02


@pytest.mark.parametrize("steps", [1, 3])
def test_alignment_is_positive_on_the_way_down_and_negative_when_overshooting(steps):
    down = noise_and_descent(1.0, 0.1, 0.0, steps, noise=0.0)
    # Past the minimum and back at every step, further each time.
    over = noise_and_descent(1.0, 2.1, 0.0, steps, noise=0.0)

    assert down[1:] == pytest.approx([1.0] * 11, abs=1e-4)
    assert over[1:] == pytest.approx([-1.0] * 11, abs=1e-4)
    if steps == 1:  # nothing has been taken before the first gradient
        assert down[0] == over[0] == 0.0
