import copy

import numpy as np
import pytest
import torch

from agents.coordinatewise import CoordinatewiseNetwork
from agents.lstm_policy import LSTMPolicyNetwork
from agents.numpy_policy import choose
from agents.recurrent_policy import Layout, RecurrentPolicy

STEPS = 20
CASES = ["coordinate-wise", "per-feature", "memoryless"]


def layout_of(groups: int) -> Layout:
    """Two entries that are shared, two of each group's own."""
    return Layout((0, 1), tuple((2 + g, 2 + groups + g) for g in range(groups)), 3)


def lively_network(case: str, groups: int):
    """Weights far from the quiet first ones."""
    draws = torch.Generator().manual_seed(3)
    if case == "coordinate-wise":
        network = CoordinatewiseNetwork(layout_of(groups), 16, draws)
    else:
        network = LSTMPolicyNetwork(layout_of(groups), 16, draws, case == "memoryless")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=draws))
    return network


def observations(groups: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(STEPS, 2 + 2 * groups))
    return rows.astype(np.float32)


def numpy_policy(network):
    return RecurrentPolicy(network)._in_numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 5, 7, 30])
def test_steps_agree_with_passes_in_torch_over_an_episode(case, groups):
    network, rows = lively_network(case, groups), observations(groups)
    with torch.no_grad():
        log_probs, last = network(torch.from_numpy(rows)[:, None], network.initial_state(1))
    policy, state = numpy_policy(network), None
    for row, expected in zip(rows, log_probs[:, 0].double().exp().numpy(), strict=True):
        probabilities, state = policy.step(row, state)
        assert (probabilities.dtype, state.dtype) == (np.float64, np.float32)
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(state, last[:, 0].numpy(), rtol=1e-5, atol=1e-5)


def test_step_refuses_an_observation_of_another_width():
    policy = numpy_policy(lively_network("per-feature", 5))
    with pytest.raises(ValueError, match=r"must have the shape \(12,\), got \(3,\)"):
        policy.step(np.zeros(3, np.float32))


def test_step_refuses_a_state_of_another_shape():
    policy = numpy_policy(lively_network("per-feature", 5))
    _, state = policy.step(np.zeros(12, np.float32))
    with pytest.raises(ValueError, match=r"states must have the shape \(2, \d+\), got \(\d+, 2\)"):
        policy.step(np.zeros(12, np.float32), state.T)


def test_a_list_is_an_observation_too():
    policy = numpy_policy(lively_network("per-feature", 5))
    expected, _ = policy.step(np.zeros(12, np.float32))
    np.testing.assert_array_equal(policy.step([0.0] * 12)[0], expected)


@pytest.mark.parametrize("case", CASES)
def test_large_weights_and_inputs_give_probabilities(case):
    network = lively_network(case, 5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e4)
    probabilities, state = numpy_policy(network).step(1e3 * observations(5)[0])
    assert np.isfinite(probabilities).all()
    assert np.isfinite(state).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_choices_are_the_likeliest_or_drawn_with_their_probabilities():
    odds = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]])
    np.testing.assert_array_equal(choose(odds, None), [1, 0])
    generator = np.random.default_rng(3)
    draws = np.stack([choose(odds, generator) for _ in range(4000)])
    shares = np.stack([(draws == choice).mean(axis=0) for choice in range(3)], axis=1)
    assert np.abs(shares - odds).max() < 5 * 0.5 / 4000**0.5
    np.testing.assert_array_equal(choose(odds, np.random.default_rng(3)), draws[0])


# The recurrent policy acts through it


def test_weights_that_changed_act_from_the_next_episode_on():
    network, row = lively_network("coordinate-wise", 2), observations(2)[0]
    policy = RecurrentPolicy(network)
    _, before = policy.predict(row)
    torch.nn.utils.vector_to_parameters(
        torch.linspace(-1, 1, sum(p.numel() for p in network.parameters())),
        list(network.parameters()),
    )
    for arguments in ((), (before, np.array([True]))):
        _, after = policy.predict(row, *arguments)
        assert not np.allclose(before, after)


def test_a_copy_acts_on_weights_of_its_own():
    network, row = lively_network("coordinate-wise", 2), observations(2)[0]
    policy = RecurrentPolicy(network)
    _, before = policy.predict(row)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.zero_()
    assert not np.allclose(other.predict(row)[1], before)
    np.testing.assert_array_equal(policy.predict(row)[1], before)
