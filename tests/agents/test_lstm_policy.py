import random

import numpy as np
import pytest
import torch

from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import Layout, RecurrentPolicy, layout_of
from asg_env.actions import BoxAction, GridAction, RelativeAction
from asg_env.observations import Observation
from asg_env.validation import ConfigError

GROUPS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc_new")
TASK = "ASG/Digits-v0"


def original_layout() -> Layout:
    labels = Observation("asg", GROUPS, "linear").labels
    return Layout.of(labels, GROUPS, GridAction("linear", 7))


def small_layout(shared: int = 2, groups: int = 1, actions: int = 3) -> Layout:
    """`shared` features, no features of the groups' own."""
    return Layout(tuple(range(shared)), ((),) * groups, actions)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def original_network(seed: int = 0) -> LSTMPolicyNetwork:
    return LSTMPolicyNetwork(original_layout(), 20, generator(seed))


def lively_network(layout: Layout | None = None, hidden: int = 6) -> LSTMPolicyNetwork:
    """Weights large enough that observation and memory move the probabilities."""
    network = LSTMPolicyNetwork(layout or original_layout(), hidden, generator())
    draws = generator(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.7, generator=draws)
    return network


def observations(steps: int, rows: int, width: int = 12) -> torch.Tensor:
    return torch.rand(steps, rows, width, generator=generator(2))


# The network


def test_network_has_the_originals_17762_parameters():
    network = original_network()
    assert sum(p.numel() for p in network.parameters()) == 17_762
    assert sum(p.numel() for p in network.net.parameters()) == 9_200
    assert sum(p.numel() for p in network.action_distribution.parameters()) == 7_854
    assert sum(p.numel() for p in network.critic.parameters()) == 708


def test_network_state_dict_has_the_originals_names_and_shapes():
    lstm = {
        "weight_ih_l0": (80, 1),
        "weight_hh_l0": (80, 20),
        "bias_ih_l0": (80,),
        "bias_hh_l0": (80,),
    }
    expected = {
        f"net.state_encoder.{i}.rnn.{name}": shape for i in range(5) for name, shape in lstm.items()
    }
    for g in range(7):
        expected[f"action_distribution.linear.{g}.weight"] = (11, 101)
        expected[f"action_distribution.linear.{g}.bias"] = (11,)
    expected["critic.fc.weight"] = (1, 707)
    expected["critic.fc.bias"] = (1,)
    stored = original_network().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected


def test_network_starts_orthogonal_with_zero_biases_and_quiet_heads():
    for name, parameter in original_network().named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any(), name
            continue
        gain = 0.01 if name.startswith("action_distribution") else 1.0
        long = parameter if parameter.shape[0] >= parameter.shape[1] else parameter.T
        product = long.T @ long
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), atol=1e-5, rtol=0)


def test_network_starts_near_the_uniform_policy():
    network = original_network()
    low, high = Observation("asg", GROUPS, "linear").space.low, torch.ones(12)
    scaled = torch.from_numpy(low).clamp(-1) + observations(4, 50) * high
    log_probs, _ = network(scaled, network.initial_state(50))
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    assert entropy.shape == (4, 50, 7)
    assert np.log(11) - entropy.min() < 0.01
    assert entropy.max() <= np.log(11) + 1e-6


def test_network_log_probabilities_are_normalised():
    network = lively_network()
    log_probs, _ = network(observations(3, 2), network.initial_state(2))
    assert log_probs.shape == (3, 2, 7, 11)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(3, 2, 7))


def test_network_carries_its_state_from_step_to_step():
    network, sequence = lively_network(), observations(6, 3)
    whole, last = network(sequence, network.initial_state(3))
    state, steps, forgetful = network.initial_state(3), [], []
    for observation in sequence:
        log_probs, state = network(observation[None], state)
        steps.append(log_probs)
        forgetful.append(network(observation[None], network.initial_state(3))[0])
    torch.testing.assert_close(torch.cat(steps), whole)
    torch.testing.assert_close(state, last)
    # The control: starting every step from zeros, as the original's deployed policy did.
    without = torch.cat(forgetful)
    torch.testing.assert_close(without[0], whole[0])
    assert (without[1:] - whole[1:]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_network_state_is_h_then_c_with_features_side_by_side():
    network = lively_network(hidden=6)
    sequence = observations(1, 2)
    _, state = network(sequence, network.initial_state(2))
    assert state.shape == (2, 2, 5 * 6)
    for index in range(5):
        _, (hidden, cell) = network.net.state_encoder[index].rnn(sequence[..., index, None])
        torch.testing.assert_close(state[0, :, 6 * index : 6 * (index + 1)], hidden[0])
        torch.testing.assert_close(state[1, :, 6 * index : 6 * (index + 1)], cell[0])


def test_network_heads_see_their_own_groups_entries_alone():
    network = lively_network()
    sequence = observations(1, 1)
    before, _ = network(sequence, network.initial_state(1))
    sequence[..., 5 + 3] += 1  # the multiplier of group 3
    after, _ = network(sequence, network.initial_state(1))
    changed = (after - before).abs().amax(dim=-1)[0, 0] > 1e-6
    assert changed.tolist() == [False, False, False, True, False, False, False]


def test_network_draws_from_its_generator_alone():
    first, second, other = original_network(3), original_network(3), original_network(4)
    for (name, a), b, c in zip(
        first.state_dict().items(),
        second.state_dict().values(),
        other.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        assert not name.endswith("weight") or not torch.equal(a, c), name


def test_layout_sorts_entries_by_label():
    layout = original_layout()
    assert layout.shared == (0, 1, 2, 3, 4)
    assert layout.per_group == tuple((i,) for i in range(5, 12))
    assert layout.actions == 11
    extended = Observation("extended", ("a", "b"), "log").labels
    layout = Layout.of(extended, ("a", "b"), RelativeAction("log", 2))
    assert layout.actions == 3
    assert layout.shared == (0, 1, 2, 3, 4)
    assert layout.per_group == ((5, 7, 9, 11), (6, 8, 10, 12))


def test_layout_refuses_box_actions():
    with pytest.raises(
        ConfigError, match=r"`env\.action` must be grid or relative .* set agent=ppo"
    ):
        Layout.of(("ce",), ("a",), BoxAction("log", 1))


@pytest.mark.parametrize(
    ("changes", "shared", "own", "actions"),
    [
        ({}, 4, 1, 3),
        ({"observation": "asg", "action": "grid", "grid": "linear"}, 5, 1, 11),
        ({"observation": "extended"}, 5, 4, 3),
    ],
)
def test_layout_of_an_environment_matches_its_spaces(
    make_settings, make_env, changes, shared, own, actions
):
    layout = layout_of(TASK, make_settings(**changes))
    assert len(layout.shared) == shared
    assert {len(entries) for entries in layout.per_group} == {own}
    assert layout.actions == actions
    width = make_env(**changes).observation_space.shape[0]
    used = sorted([*layout.shared, *(i for entries in layout.per_group for i in entries)])
    assert used == list(range(width))


# Acting


def test_predict_takes_one_observation_or_several_rows():
    policy = RecurrentPolicy(lively_network())
    rows = observations(1, 4)[0].numpy()
    action, state = policy.predict(rows[0], deterministic=True)
    assert (action.shape, action.dtype) == ((7,), np.int64)
    assert state.shape == (1, 2, 30)
    action, state = policy.predict(rows, None, np.ones(4, dtype=bool), deterministic=True)
    assert (action.shape, action.dtype) == ((4, 7), np.int64)
    assert state.shape == (4, 2, 30)


def test_predict_refuses_observations_of_another_width():
    policy = RecurrentPolicy(lively_network())
    with pytest.raises(ValueError, match="observations must have 12 entries, got 25"):
        policy.predict(observations(1, 4, 25)[0].numpy())


def test_predict_gives_each_row_what_it_gets_alone():
    policy = RecurrentPolicy(lively_network())
    rows, states = observations(2, 4).numpy(), None
    together = []
    for step in rows:
        action, states = policy.predict(step, states, deterministic=True)
        together.append((action, states))
    for index in range(4):
        state = None
        for step, (actions, after) in zip(rows, together, strict=True):
            action, state = policy.predict(step[index], state, deterministic=True)
            np.testing.assert_array_equal(action, actions[index])
            np.testing.assert_array_equal(state[0], after[index])  # bit for bit


def test_predict_starts_from_zero_where_an_episode_starts():
    policy = RecurrentPolicy(lively_network())
    rows = observations(2, 2).numpy()
    _, state = policy.predict(rows[0])
    _, fresh = policy.predict(rows[1], None)
    _, carried = policy.predict(rows[1], state, np.array([False, False]))
    _, mixed = policy.predict(rows[1], state, np.array([True, False]))
    np.testing.assert_array_equal(mixed[0], fresh[0])
    np.testing.assert_array_equal(mixed[1], carried[1])
    assert not np.array_equal(fresh, carried)


def test_predict_takes_the_most_likely_choices_when_deterministic():
    network = lively_network()
    policy = RecurrentPolicy(network)
    rows = observations(1, 5)
    log_probs, _ = network(rows, network.initial_state(5))
    action, _ = policy.predict(rows[0].numpy(), deterministic=True)
    np.testing.assert_array_equal(action, log_probs[0].argmax(dim=-1).numpy())


def test_predict_samples_by_its_seed():
    policy = RecurrentPolicy(original_network())
    row = observations(1, 1)[0, 0].numpy()

    def draw(seed: int) -> np.ndarray:
        policy.seed(seed)
        return np.stack([policy.predict(row)[0] for _ in range(5)])

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_predict_samples_with_the_networks_probabilities():
    network = lively_network(small_layout(actions=4))
    policy = RecurrentPolicy(network)
    row = observations(1, 1, 2)
    log_probs, _ = network(row, network.initial_state(1))
    expected = log_probs[0, 0, 0].exp().detach().numpy()
    drawn = policy.predict(np.repeat(row[0].numpy(), 3000, axis=0))[0][:, 0]
    np.testing.assert_allclose([(drawn == i).mean() for i in range(4)], expected, atol=0.03)
    assert expected.max() - expected.min() > 0.1  # else the test would show nothing


def test_policy_leaves_global_generators_alone():
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # noqa: NPY002 - the global state is what is tested
        random.getstate(),
    )
    policy = RecurrentPolicy(original_network())
    policy.predict(np.zeros(12, np.float32))
    policy.predict(np.zeros(12, np.float32), deterministic=True)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
