"""The setting `memoryless`: every step from a zero state, in acting and in updating alike."""

import copy

import numpy as np
import pytest
import torch

from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import Layout, RecurrentPolicy
from agents.reinforce import Reinforce, ReinforceSettings, advantages
from asg_env.validation import validate

LAYOUT = Layout((0, 1), ((2,), (3,)), 3)


def lively_network(memoryless: bool) -> LSTMPolicyNetwork:
    """Weights large enough that memory moves the probabilities."""
    network = LSTMPolicyNetwork(LAYOUT, 6, torch.Generator().manual_seed(0), memoryless)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.7, generator=draws)
    return network


def observations(steps: int, rows: int) -> torch.Tensor:
    return torch.rand(steps, rows, 4, generator=torch.Generator().manual_seed(2))


def settings(**changes) -> ReinforceSettings:
    small = {"instances_per_update": 2, "rollouts_per_instance": 2, "hidden_size": 4, "passes": 1}
    return validate(ReinforceSettings, {**small, **changes}, "agent")


def test_memory_is_kept_unless_asked_otherwise():
    assert not ReinforceSettings().memoryless
    assert not Reinforce(LAYOUT, settings(), 0).policy.network.memoryless
    assert Reinforce(LAYOUT, settings(memoryless=True), 0).policy.network.memoryless


@torch.no_grad()
def test_memoryless_network_evaluates_each_step_as_a_first_one():
    network, control = lively_network(memoryless=True), lively_network(memoryless=False)
    rows = observations(4, 3)
    together, state = network(rows, network.initial_state(3))
    assert together.shape == (4, 3, 2, 3)
    assert state.shape == (2, 3, 12)
    assert not state.any()
    for t in range(4):
        for row in range(3):
            alone, _ = control(rows[t, row][None, None], control.initial_state(1))
            torch.testing.assert_close(together[t, row], alone[0, 0])
    recurrent, after = control(rows, control.initial_state(3))
    torch.testing.assert_close(recurrent[0], together[0])
    assert (recurrent[1:] - together[1:]).abs().amax() > 0.01  # the control remembers
    assert after.any()


@pytest.mark.parametrize("memoryless", [True, False])
def test_predict_acts_the_same_whatever_came_before_only_if_memoryless(memoryless):
    policy = RecurrentPolicy(lively_network(memoryless))
    rows = observations(30, 1)[:, 0].numpy()
    fresh = [policy.predict(row, deterministic=True)[0] for row in rows]
    state, carried = None, []
    for row in rows:
        action, state = policy.predict(row, state, deterministic=True)
        carried.append(action)
    assert np.array_equal(fresh, carried) == memoryless
    assert bool(state.any()) != memoryless
    noise = np.full((1, 2, 12), 5.0, np.float32)  # a state that came from elsewhere
    strange = [policy.predict(row, noise, deterministic=True)[0] for row in rows]
    assert np.array_equal(fresh, strange) == memoryless


def uneven_batch(make_episode) -> list:
    draws = np.random.default_rng(1)
    return [
        make_episode(
            draws.normal(size=steps), draws.integers(3, size=(steps, 2)), draws.random((steps, 4))
        )
        for steps in (3, 1, 3, 2)
    ]


def test_update_uses_the_log_probabilities_of_memoryless_acting(make_episode):
    learner = Reinforce(LAYOUT, settings(memoryless=True, max_grad_norm=1e9), seed=0)
    control = Reinforce(LAYOUT, settings(max_grad_norm=1e9), seed=0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ours, other in zip(
            learner.policy.network.parameters(), control.policy.network.parameters(), strict=True
        ):
            other.copy_(ours.normal_(0, 0.7, generator=draws))
    episodes = uneven_batch(make_episode)
    network = copy.deepcopy(control.policy.network)  # recurrent, but asked one step at a time
    loss = torch.zeros(())
    for row, episode in zip(advantages(episodes, 2, 1.0), episodes, strict=True):
        for t, (observation, action) in enumerate(
            zip(episode.observations, episode.actions, strict=True)
        ):
            log_probs, _ = network(
                torch.from_numpy(observation)[None, None], network.initial_state(1)
            )
            chosen = sum(log_probs[0, 0, g, int(choice)] for g, choice in enumerate(action))
            loss = loss - float(row[t]) * chosen / len(episodes)
    loss.backward()
    learner.update(episodes, 0.0)
    control.update(episodes, 0.0)
    differ = []
    for (name, hand), ours, other in zip(
        network.named_parameters(),
        learner.policy.network.parameters(),
        control.policy.network.parameters(),
        strict=True,
    ):
        if not name.startswith("critic"):
            torch.testing.assert_close(ours.grad, hand.grad, atol=1e-6, rtol=1e-4)
            differ.append(float((other.grad - hand.grad).abs().max()))
    assert max(differ) > 1e-3  # the gradient through time is another one
