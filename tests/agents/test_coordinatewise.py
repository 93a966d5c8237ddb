import copy
import random

import numpy as np
import pytest
import torch

from agents.coordinatewise import PLACE, CoordinatewiseNetwork
from agents.recurrent_policy import Layout, RecurrentPolicy, layout_of
from asg_env.observations import Observation

TASK = "ASG/Digits-v0"
SHARED, OWN = 2, 2  # entries of the layouts below


def layout_for(groups: int, shared: int = SHARED, own: int = OWN, actions: int = 3) -> Layout:
    """Shared entries first, then each group's own ones together."""
    starts = [shared + own * group for group in range(groups)]
    return Layout(tuple(range(shared)), tuple(tuple(range(s, s + own)) for s in starts), actions)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively_network(layout: Layout, hidden: int = 6, place: bool = True) -> CoordinatewiseNetwork:
    """Weights large enough that observation and memory move the outputs.

    Without `place`, a group cannot tell where it stands.
    """
    network = CoordinatewiseNetwork(layout, hidden, generator())
    draws = generator(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.7, generator=draws)
        if not place:
            inputs = network.rnn.input_size
            for weight in (network.rnn.weight_ih_l0, network.actor.weight, network.critic.weight):
                weight[:, inputs - PLACE : inputs] = 0
    return network


def observations(steps: int, rows: int, layout: Layout) -> torch.Tensor:
    width = len(layout.shared) + sum(len(own) for own in layout.per_group)
    return torch.rand(steps, rows, width, generator=generator(2))


def unroll(network: CoordinatewiseNetwork, sequence: torch.Tensor):
    return network.unroll(sequence, network.initial_state(sequence.shape[1]))


def equal_entries(groups: int, steps: int = 4, rows: int = 2) -> torch.Tensor:
    """Observations in which all groups' own entries are the same."""
    layout = layout_for(groups)
    sequence = observations(steps, rows, layout)
    own = torch.rand(steps, rows, OWN, generator=generator(3))
    for entries in layout.per_group:
        sequence[..., list(entries)] = own
    return sequence


# Sizes


def test_network_has_the_shapes_of_one_group_whatever_their_number():
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for network in (CoordinatewiseNetwork(layout_for(g), 6, generator()) for g in (1, 5, 7, 30))
    ]
    inputs = SHARED + OWN + 3
    assert shapes[0] == {
        "rnn.weight_ih_l0": (24, inputs),
        "rnn.weight_hh_l0": (24, 6),
        "rnn.bias_ih_l0": (24,),
        "rnn.bias_hh_l0": (24,),
        "actor.weight": (3, inputs + 6),
        "actor.bias": (3,),
        "critic.weight": (1, inputs + 6),
        "critic.bias": (1,),
    }
    assert shapes[1:] == [shapes[0]] * 3


@pytest.mark.parametrize(
    ("observation", "entries"), [("scaled", 4 + 1), ("asg", 5 + 1), ("extended", 5 + 4)]
)
def test_network_of_an_environment_has_as_many_parameters_as_its_entries_ask_for(
    make_settings, observation, entries
):
    layout = layout_of(TASK, make_settings(observation=observation))
    network = CoordinatewiseNetwork(layout, 32, generator())
    inputs = entries + 3
    lstm = 4 * 32 * (inputs + 32) + 2 * 4 * 32
    heads = (3 + 1) * (inputs + 32 + 1)
    assert sum(p.numel() for p in network.parameters()) == lstm + heads


@pytest.mark.parametrize("groups", [7, 30])
def test_network_trained_on_five_groups_drives_others(groups):
    five = lively_network(layout_for(5))
    other = CoordinatewiseNetwork(layout_for(groups), 6, generator(9))
    other.load_state_dict(five.state_dict())
    log_probs, values, state = unroll(other, observations(3, 2, layout_for(groups)))
    assert log_probs.shape == (3, 2, groups, 3)
    assert values.shape == (3, 2)
    assert state.shape == (2, 2, groups * 6)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(3, 2, groups))


@pytest.mark.parametrize("groups", [7, 30])
def test_the_same_weights_say_the_same_of_first_and_last_group_whatever_stands_between(groups):
    # They are at depth -1 and 1 in every network, and see their own rows alone.
    five, many = lively_network(layout_for(5)), lively_network(layout_for(groups))
    few_log_probs, *_ = unroll(five, equal_entries(5))
    sequence = equal_entries(groups)
    sequence[..., :SHARED] = equal_entries(5)[..., :SHARED]
    log_probs, *_ = unroll(many, sequence)
    torch.testing.assert_close(log_probs[:, :, [0, -1]], few_log_probs[:, :, [0, -1]])


@pytest.mark.parametrize(("groups", "own"), [(1, 2), (3, 0), (1, 0)])
def test_network_takes_a_single_group_and_groups_without_entries_of_their_own(groups, own):
    layout = layout_for(groups, own=own)
    network = lively_network(layout)
    log_probs, values, _ = unroll(network, observations(2, 3, layout))
    assert log_probs.shape == (2, 3, groups, 3)
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(values).all()


# What it computes


def by_hand(network: CoordinatewiseNetwork, layout: Layout, sequence: torch.Tensor):
    """Log-probabilities, values and last state of one row, group by group and gate by gate."""
    groups, rnn = len(layout.per_group), network.rnn
    h, c = ([torch.zeros(network.hidden_size)] * groups for _ in range(2))
    log_probs, values = [], []
    for observation in sequence:
        known = []
        for g, own in enumerate(layout.per_group):
            entries = [observation[i] for i in (*layout.shared, *own)]
            place = [-1 + 2 * g / (groups - 1), float(g == 0), float(g == groups - 1)]
            row = torch.tensor([*entries, *place])
            gates = rnn.weight_ih_l0 @ row + rnn.bias_ih_l0
            gates = gates + rnn.weight_hh_l0 @ h[g] + rnn.bias_hh_l0
            let_in, keep, new, let_out = gates.chunk(4)
            c[g] = torch.sigmoid(keep) * c[g] + torch.sigmoid(let_in) * torch.tanh(new)
            h[g] = torch.sigmoid(let_out) * torch.tanh(c[g])
            known.append(torch.cat((row, h[g])))
        logits = torch.stack(known) @ network.actor.weight.T + network.actor.bias
        log_probs.append(logits - logits.exp().sum(dim=1, keepdim=True).log())
        mean = torch.stack(known).mean(dim=0)
        values.append(network.critic.weight[0] @ mean + network.critic.bias[0])
    return torch.stack(log_probs), torch.stack(values), torch.stack((torch.cat(h), torch.cat(c)))


def test_unroll_follows_the_lstm_written_out_group_by_group():
    layout = layout_for(4)
    network = lively_network(layout)
    sequence = observations(5, 2, layout)
    log_probs, values, state = unroll(network, sequence)
    for row in range(2):
        hand_log_probs, hand_values, hand_state = by_hand(network, layout, sequence[:, row])
        torch.testing.assert_close(log_probs[:, row], hand_log_probs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[:, row], hand_values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[:, row], hand_state, atol=1e-5, rtol=1e-4)


def test_unroll_equals_step_by_step():
    layout = layout_for(5)
    network, sequence = lively_network(layout), observations(6, 3, layout)
    whole, values, last = unroll(network, sequence)
    state, steps, stepwise, forgetful = network.initial_state(3), [], [], []
    for observation in sequence:
        log_probs, value, state = network.unroll(observation[None], state)
        steps.append(log_probs)
        stepwise.append(value)
        forgetful.append(unroll(network, observation[None])[0])
    torch.testing.assert_close(torch.cat(steps), whole)
    torch.testing.assert_close(torch.cat(stepwise), values)
    torch.testing.assert_close(state, last)
    # The control: without its state it says something else from the second step on.
    without = torch.cat(forgetful)
    torch.testing.assert_close(without[0], whole[0])
    assert (without[1:] - whole[1:]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_forward_equals_unroll_bit_for_bit():
    layout = layout_for(5)
    network, sequence = lively_network(layout), observations(4, 2, layout)
    log_probs, state = network(sequence, network.initial_state(2))
    unrolled, _, after = unroll(network, sequence)
    assert torch.equal(log_probs, unrolled)
    assert torch.equal(state, after)


def test_rows_do_not_see_one_another():
    layout = layout_for(5)
    network, sequence = lively_network(layout), observations(4, 3, layout)
    together = unroll(network, sequence)
    for row in range(3):
        alone = unroll(network, sequence[:, row : row + 1])
        for ours, theirs in zip(alone[:2], together[:2], strict=True):
            torch.testing.assert_close(ours[:, 0], theirs[:, row])
        torch.testing.assert_close(alone[2][:, 0], together[2][:, row])


def test_a_groups_choice_depends_on_its_own_and_the_shared_entries_alone():
    layout = layout_for(5)
    network, sequence = lively_network(layout), observations(3, 1, layout)
    before, *_ = unroll(network, sequence)
    moved = sequence.clone()
    moved[0, :, list(layout.per_group[3])] += 1
    changed = (unroll(network, moved)[0] - before).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert changed.tolist() == [False, False, False, True, False]
    moved = sequence.clone()
    moved[0, :, 0] += 1
    assert ((unroll(network, moved)[0] - before).abs().amax(dim=(0, 1, 3)) > 1e-4).all()


def test_groups_with_equal_entries_differ_by_their_place_alone():
    layout = layout_for(5)
    log_probs, *_ = unroll(lively_network(layout, place=False), equal_entries(5))
    torch.testing.assert_close(log_probs, log_probs[:, :, :1].expand_as(log_probs))
    log_probs, *_ = unroll(lively_network(layout), equal_entries(5))  # the control
    for group in range(1, 5):
        assert (log_probs[:, :, group] - log_probs[:, :, 0]).abs().max() > 0.01


def test_permuting_the_groups_entries_permutes_the_outputs_but_for_their_place():
    layout, order = layout_for(5), [3, 0, 4, 2, 1]
    sequence = observations(4, 2, layout)
    permuted = sequence.clone()
    for place, source in enumerate(order):
        own = sequence[..., list(layout.per_group[source])]
        permuted[..., list(layout.per_group[place])] = own
    network = lively_network(layout, place=False)
    log_probs, values, state = unroll(network, sequence)
    after, same_values, moved = unroll(network, permuted)
    torch.testing.assert_close(after, log_probs[:, :, order])
    torch.testing.assert_close(same_values, values)  # of the mean over groups
    torch.testing.assert_close(
        moved.unflatten(-1, (5, 6)), state.unflatten(-1, (5, 6))[:, :, order]
    )
    network = lively_network(layout)  # the control
    difference = unroll(network, permuted)[0] - unroll(network, sequence)[0][:, :, order]
    assert difference.abs().max() > 0.01


# First weights


def test_network_starts_orthogonal_with_zero_biases_and_a_quiet_actor():
    for name, parameter in CoordinatewiseNetwork(layout_for(5), 6, generator()).named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any(), name
            continue
        gain = 0.01 if name.startswith("actor") else 1.0
        long = parameter if parameter.shape[0] >= parameter.shape[1] else parameter.T
        product = long.T @ long
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), atol=1e-5, rtol=0)


def test_network_starts_near_the_uniform_policy():
    layout = layout_for(5)
    log_probs, *_ = unroll(
        CoordinatewiseNetwork(layout, 6, generator()), observations(9, 9, layout)
    )
    torch.testing.assert_close(
        log_probs.exp(), torch.full_like(log_probs, 1 / 3), atol=0.01, rtol=0
    )


def test_network_draws_from_its_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (
        CoordinatewiseNetwork(layout_for(5), 6, generator(seed)).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert not name.endswith("weight") or not torch.equal(tensor, other[name]), name


# As a policy


def acted(policy: RecurrentPolicy, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    policy.seed(5)
    state, actions = None, []
    for step, row in enumerate(rows):
        action, state = policy.predict(row, state, np.array([step == 0]))
        actions.append(action)
    return np.array(actions), state


def test_policy_acts_the_same_after_it_was_copied_to_a_worker():
    layout = layout_for(5)
    policy = RecurrentPolicy(lively_network(layout))
    rows = observations(6, 1, layout)[:, 0].numpy()
    actions, state = acted(policy, rows)
    assert (actions.shape, actions.dtype) == ((6, 5), np.int64)
    again, after = acted(copy.deepcopy(policy), rows)
    np.testing.assert_array_equal(again, actions)
    np.testing.assert_array_equal(after, state)


def test_policy_takes_the_likeliest_choices_when_deterministic():
    layout = layout_for(5)
    network = lively_network(layout)
    rows = observations(1, 4, layout)
    action, _ = RecurrentPolicy(network).predict(rows[0].numpy(), deterministic=True)
    np.testing.assert_array_equal(action, unroll(network, rows)[0][0].argmax(dim=-1).numpy())


def test_policy_leaves_global_generators_and_gradients_alone():
    layout = layout_for(5)
    policy = RecurrentPolicy(lively_network(layout))
    before = torch.get_rng_state(), random.getstate()
    action, state = policy.predict(observations(1, 1, layout)[0, 0].numpy())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert all(p.grad is None for p in policy.network.parameters())
    assert isinstance(action, np.ndarray)
    assert isinstance(state, np.ndarray)


def test_layout_of_labels_gives_every_group_the_same_entries_in_the_same_order():
    groups = ("a", "b", "c")
    labels = Observation("extended", groups, "log").labels
    own = [tuple(i for i, x in enumerate(labels) if x.endswith(f"/{g}")) for g in groups]
    names = [[labels[i].rsplit("/", 1)[0] for i in entries] for entries in own]
    assert names == [names[0]] * 3
