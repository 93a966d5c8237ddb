import copy
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agents.reinforce import (
    Layout,
    Learner,
    LSTMPolicyNetwork,
    Reinforce,
    ReinforcePolicy,
    ReinforceSettings,
    advantages,
    final_accuracy,
    layout_of,
    load_policy,
    returns_to_go,
)
from asg_env.actions import BoxAction, GridAction, RelativeAction
from asg_env.config import ConfigError, validate
from asg_env.observations import Observation

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


def settings(**changes) -> ReinforceSettings:
    defaults = {
        "instances_per_update": 2,
        "rollouts_per_instance": 2,
        "hidden_size": 4,
        "passes": 1,
    }
    return validate(ReinforceSettings, {**defaults, **changes}, "agent")


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
    with pytest.raises(ConfigError, match=r"`env\.action` must be grid or relative .* use PPO"):
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
    policy = ReinforcePolicy(lively_network())
    rows = observations(1, 4)[0].numpy()
    action, state = policy.predict(rows[0], deterministic=True)
    assert (action.shape, action.dtype) == ((7,), np.int64)
    assert state.shape == (1, 2, 30)
    action, state = policy.predict(rows, None, np.ones(4, dtype=bool), deterministic=True)
    assert (action.shape, action.dtype) == ((4, 7), np.int64)
    assert state.shape == (4, 2, 30)


def test_predict_gives_each_row_what_it_gets_alone():
    policy = ReinforcePolicy(lively_network())
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
    policy = ReinforcePolicy(lively_network())
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
    policy = ReinforcePolicy(network)
    rows = observations(1, 5)
    log_probs, _ = network(rows, network.initial_state(5))
    action, _ = policy.predict(rows[0].numpy(), deterministic=True)
    np.testing.assert_array_equal(action, log_probs[0].argmax(dim=-1).numpy())


def test_predict_samples_by_its_seed():
    policy = ReinforcePolicy(original_network())
    row = observations(1, 1)[0, 0].numpy()

    def draw(seed: int) -> np.ndarray:
        policy.seed(seed)
        return np.stack([policy.predict(row)[0] for _ in range(5)])

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_predict_samples_with_the_networks_probabilities():
    network = lively_network(small_layout(actions=4))
    policy = ReinforcePolicy(network)
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
    policy = ReinforcePolicy(original_network())
    policy.predict(np.zeros(12, np.float32))
    policy.predict(np.zeros(12, np.float32), deterministic=True)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


# Credit


def test_returns_to_go_follow_the_recurrence_by_hand():
    np.testing.assert_allclose(
        returns_to_go(np.array([1.0, 2.0, 3.0]), 0.5), [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3]
    )


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
def test_returns_to_go_of_constant_rewards_equal_the_closed_form(discount):
    steps = 12
    left = steps - np.arange(steps)
    expected = left if discount == 1 else (1 - discount**left) / (1 - discount)
    returns = returns_to_go(np.ones(steps), discount)
    np.testing.assert_allclose(returns, expected)
    if discount:  # the control: rewards alone are not returns
        assert not np.allclose(returns, np.ones(steps))


def test_advantages_give_each_step_its_own_credit(make_episode):
    # Two rollouts of one instance. Discount 1: the same return from the first step on, so only
    # the second step is credited. Discount 0: each step answers for its own reward.
    episodes = [make_episode([1, 0]), make_episode([0, 1])]
    spread = np.std([0, -0.5, 0, 0.5])
    np.testing.assert_allclose(
        advantages(episodes, 2, 1.0), np.array([[0, -0.5], [0, 0.5]]) / spread, rtol=1e-6
    )
    np.testing.assert_allclose(advantages(episodes, 2, 0.0), [[1, -1], [-1, 1]], rtol=1e-6)


def test_advantages_have_zero_mean_per_instance_and_step_and_unit_spread(make_episode):
    rewards = np.random.default_rng(0).normal(size=(12, 5))
    rewards[:4] += 10  # an easy instance
    result = advantages([make_episode(row) for row in rewards], 4, 0.9)
    np.testing.assert_allclose(result.reshape(3, 4, 5).mean(axis=1), 0, atol=1e-10)
    assert result.std() == pytest.approx(1.0)
    # A constant that an instance adds to every rollout changes nothing.
    rewards[:4] -= 10
    np.testing.assert_allclose(
        result, advantages([make_episode(row) for row in rewards], 4, 0.9), atol=1e-10
    )


def test_advantages_keep_early_divergence_out_of_the_others_baseline(make_episode):
    going_on = [make_episode([0, 1, 2, 3]), make_episode([0, 3, 2, 1])]
    diverged = make_episode([-5.0], diverged=True)
    result = advantages([*going_on, diverged, make_episode([0, 2, 2, 2])], 4, 1.0)
    returns = np.array([[6, 6, 5, 3], [6, 6, 3, 1], [6, 6, 4, 2]])
    centred = returns[:, 1:] - returns[:, 1:].mean(axis=0)  # from step 1 on three are running
    ratio = result[[0, 1, 3], 1:] / np.where(centred == 0, 1, centred)
    np.testing.assert_allclose(result[[0, 1, 3], 1:][centred == 0], 0, atol=1e-9)
    assert np.ptp(ratio[centred != 0]) < 1e-9  # all divided by one and the same spread
    np.testing.assert_array_equal(result[2, 1:], 0)  # nothing after its end
    assert result[2, 0] < 0 < result[0, 0]  # the step at which it diverged is its fault


def test_advantages_of_equal_rewards_are_zero_and_finite(make_episode):
    np.testing.assert_array_equal(advantages([make_episode([0, 0])] * 4, 2, 1.0), np.zeros((4, 2)))
    np.testing.assert_allclose(advantages([make_episode([3, 3])] * 4, 2, 1.0), 0, atol=1e-6)


def test_final_accuracy_is_zero_where_none_was_read(make_episode):
    assert final_accuracy(make_episode([0, 0], accuracy=[0.3, 0.4])) == 0.4
    assert final_accuracy(make_episode([0, 0])) == 0.0


# The update


def uneven_batch(make_episode, layout: Layout, width: int) -> list:
    draws = np.random.default_rng(1)
    lengths = (3, 1, 3, 2)
    return [
        make_episode(
            draws.normal(size=steps),
            draws.integers(layout.actions, size=(steps, len(layout.per_group))),
            draws.random((steps, width)),
        )
        for steps in lengths
    ]


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_update_with_one_pass_follows_the_hand_written_reinforce_gradient(
    make_episode, entropy_weight
):
    layout = Layout((0, 1), ((2,), (3,)), 3)
    learner = Reinforce(layout, settings(max_grad_norm=1e9, discount=0.9), seed=0)
    episodes = uneven_batch(make_episode, layout, 4)
    network = copy.deepcopy(learner.policy.network)
    credit = advantages(episodes, 2, 0.9)
    loss, entropies = torch.zeros(()), []
    for row, episode in zip(credit, episodes, strict=True):
        state = network.initial_state(1)
        for t, (observation, action) in enumerate(
            zip(episode.observations, episode.actions, strict=True)
        ):
            log_probs, state = network(torch.from_numpy(observation)[None, None], state)
            chosen = sum(log_probs[0, 0, g, int(choice)] for g, choice in enumerate(action))
            loss = loss - float(row[t]) * chosen / len(episodes)
            for group in range(2):
                p = log_probs[0, 0, group].exp()
                entropies.append(-(p * log_probs[0, 0, group]).sum())
    horizon = 3
    loss = loss - entropy_weight * horizon * torch.stack(entropies).mean()
    loss.backward()
    statistics = learner.update(episodes, entropy_weight)
    for (name, hand), ours in zip(
        network.named_parameters(), learner.policy.network.parameters(), strict=True
    ):
        if name.startswith("critic"):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, hand.grad, atol=1e-6, rtol=1e-4)
    assert statistics["entropy"] == pytest.approx(torch.stack(entropies).mean().item(), abs=1e-5)
    squares = [p.grad.square().sum() for p in network.parameters() if p.grad is not None]
    assert statistics["grad_norm"] == pytest.approx(float(sum(squares).sqrt()), rel=1e-4)


def test_update_ignores_what_stands_after_an_episodes_end(make_episode):
    # Padding is invisible: two long rollouts first or last give the same gradient.
    layout = small_layout()
    gradients = []
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        learner = Reinforce(layout, settings(max_grad_norm=1e9), seed=0)
        episodes = uneven_batch(make_episode, layout, 2)
        learner.update([episodes[i] for i in order], 0.1)
        gradients.append(
            [p.grad for p in learner.policy.network.parameters() if p.grad is not None]
        )
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-7, rtol=1e-4)


def test_update_bounds_the_gradient_norm(make_episode):
    layout = small_layout()
    learner = Reinforce(layout, settings(max_grad_norm=1e-3), seed=0)
    statistics = learner.update(uneven_batch(make_episode, layout, 2), 0.0)
    squares = [
        p.grad.square().sum() for p in learner.policy.network.parameters() if p.grad is not None
    ]
    assert statistics["grad_norm"] > 1e-3
    assert float(sum(squares).sqrt()) == pytest.approx(1e-3, rel=1e-3)


def test_update_changes_nothing_without_reward_and_entropy_bonus(make_episode):
    layout = small_layout()
    learner = Reinforce(layout, settings(passes=3), seed=0)
    before = copy.deepcopy(learner.policy.network.state_dict())
    episodes = [make_episode([0, 0], [[i % 3]] * 2, np.ones((2, 2))) for i in range(4)]
    learner.update(episodes, 0.0)
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_update_raises_entropy_when_only_the_bonus_pulls(make_episode):
    layout = small_layout()
    learner = Reinforce(layout, settings(policy_lr=0.05), seed=0)
    draws = generator(5)
    with torch.no_grad():
        learner.policy.network.action_distribution.linear[0].weight.normal_(0, 2, generator=draws)
    episodes = [make_episode([0, 0], [[i % 3]] * 2, np.ones((2, 2))) for i in range(4)]
    entropies = [learner.update(episodes, 0.1)["entropy"] for _ in range(10)]
    assert entropies[-1] > entropies[0] + 0.01


def test_update_keeps_the_policy_near_when_the_ratio_is_clipped(make_episode):
    # Good and bad choices of a one-step problem, reused for many passes.
    layout = small_layout()
    episodes = [make_episode([float(i == 0)], [[i]], np.ones((1, 2))) for i in (0, 1)]

    def probability_after(clip_ratio: float) -> float:
        learner = Reinforce(
            layout,
            settings(passes=300, clip_ratio=clip_ratio, policy_lr=0.004, instances_per_update=1),
            seed=0,
        )
        learner.update(episodes, 0.0)
        network = learner.policy.network
        log_probs, _ = network(torch.ones(1, 1, 2), network.initial_state(1))
        return log_probs[0, 0, 0, 0].exp().item()

    assert 0.36 < probability_after(0.2) < 0.5
    assert probability_after(1e6) > 0.9  # the control


# Probe problems: the answer is known, no network is trained on images


def play(learner, problem, make_episode, instances: int, rollouts: int, seed: int) -> list:
    """Roll the policy out on `problem(instance) -> (observations, reward of (step, action))`."""
    draws = np.random.default_rng(seed)
    episodes = []
    for instance in draws.integers(2, size=instances).tolist():
        seen, reward = problem(instance)
        for _ in range(rollouts):
            learner.policy.seed(10_000 * seed + len(episodes))
            state, actions = None, []
            for step, observation in enumerate(seen):
                action, state = learner.policy.predict(
                    np.asarray(observation, np.float32), state, np.array([step == 0])
                )
                actions.append(action)
            rewards = [reward(step, action) for step, action in enumerate(actions)]
            episodes.append(make_episode(rewards, actions, seen))
    return episodes


def bandit(instance: int):
    """Reward 1 for choosing action 2 in group 0; the other group does not matter."""
    return [[1.0, 0.5]] * 2, lambda step, action: float(action[0] == 2)


def nothing(instance: int):
    return [[1.0, 0.5]] * 2, lambda step, action: 0.0


def memory(instance: int):
    """A cue at the first step alone says which action is right at the last one."""
    cue = 1.0 if instance else -1.0
    right = 2 if instance else 0
    return [[cue], [0.0], [0.0]], lambda step, action: float(step == 2 and action[0] == right)


def mean_return(learner, problem, make_episode) -> float:
    episodes = play(learner, problem, make_episode, 40, 2, seed=999)
    return float(np.mean([episode.rewards.sum() for episode in episodes]))


def fit_probe(learner, problem, make_episode, updates: int) -> None:
    for update in range(updates):
        learner.update(play(learner, problem, make_episode, 4, 6, update), 0.0)


def probe_learner(layout: Layout) -> Reinforce:
    return Reinforce(
        layout,
        settings(hidden_size=8, rollouts_per_instance=6, policy_lr=0.03, passes=4),
        seed=1,
    )


def test_learner_solves_a_bandit(make_episode):
    learner = probe_learner(small_layout(groups=2))
    assert mean_return(learner, bandit, make_episode) < 0.9  # 2/3 by chance
    fit_probe(learner, bandit, make_episode, 15)
    assert mean_return(learner, bandit, make_episode) > 1.9


def test_learner_does_not_solve_the_bandit_without_reward(make_episode):
    learner = probe_learner(small_layout(groups=2))
    fit_probe(learner, nothing, make_episode, 15)
    assert mean_return(learner, bandit, make_episode) < 0.9


class Forgetful(LSTMPolicyNetwork):
    """The control: every step starts from zeros, in acting and in updating alike."""

    def forward(self, observations, state):
        steps = [super(Forgetful, self).forward(o[None], 0 * state) for o in observations]
        return torch.cat([log_probs for log_probs, _ in steps]), steps[-1][1]


@pytest.mark.parametrize("remembers", [True, False])
def test_learner_solves_the_memory_probe_only_when_it_remembers(make_episode, remembers):
    learner = probe_learner(small_layout(shared=1))
    if not remembers:
        learner.policy.network.__class__ = Forgetful
    fit_probe(learner, memory, make_episode, 40)
    solved = mean_return(learner, memory, make_episode)
    assert solved > 0.95 if remembers else solved < 0.7  # 1/2 without the cue


# Checkpoints


def trained(make_episode, layout: Layout, updates: int) -> Reinforce:
    learner = Reinforce(layout, settings(), seed=0)
    for _ in range(updates):
        learner.update(uneven_batch(make_episode, layout, 2), 0.1)
    return learner


def test_learner_state_goes_on_exactly(make_episode):
    layout = small_layout()
    whole = trained(make_episode, layout, 3)
    resumed = Reinforce(layout, settings(), seed=9)
    resumed.load_state(trained(make_episode, layout, 2).state())
    resumed.update(uneven_batch(make_episode, layout, 2), 0.1)
    expected = whole.state()
    assert resumed.state().keys() == expected.keys()
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, expected[name]), name


def learner_of(make_settings, **changes) -> Learner:
    return Learner(TASK, make_settings(), settings(**changes), seed=0, workers=1)


def test_learner_checkpoint_holds_tensors_and_the_number_of_finished_updates(
    make_settings, tmp_path
):
    learner, path = learner_of(make_settings), tmp_path / "last.safetensors"
    learner.save(path, update=6)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]  # no temporary file
    fresh = Learner(TASK, make_settings(), settings(), seed=5, workers=1)
    assert fresh.load(path) == 7
    for name, tensor in fresh.policy.network.state_dict().items():
        assert torch.equal(tensor, learner.policy.network.state_dict()[name]), name


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_learner_load_says_in_a_sentence_that_a_checkpoint_is_truncated(
    make_settings, tmp_path, share
):
    learner, path = learner_of(make_settings), tmp_path / "last.safetensors"
    learner.save(path, update=0)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match="is no whole checkpoint of this agent") as caught:
        learner.load(path)
    assert "\n" not in str(caught.value)


def test_learner_load_refuses_the_checkpoint_of_another_network(make_settings, tmp_path):
    path = tmp_path / "last.safetensors"
    learner_of(make_settings, hidden_size=5).save(path, update=0)
    with pytest.raises(ConfigError, match="no whole checkpoint of this agent") as caught:
        learner_of(make_settings).load(path)
    assert "\n" not in str(caught.value)


def test_learner_load_refuses_tensors_without_the_number_of_updates(make_settings, tmp_path):
    path = tmp_path / "last.safetensors"
    learner_of(make_settings).save(path, update=0)
    save_file(load_file(str(path)), str(path))
    with pytest.raises(ConfigError, match="no whole checkpoint of this agent"):
        learner_of(make_settings).load(path)


def test_load_policy_acts_as_the_learner_that_was_saved(trained_run):
    experiment = trained_run.experiment
    path = trained_run.seed_folder(0) / "checkpoints" / "last.safetensors"
    policy = load_policy(path, experiment)
    learner = Learner(TASK, experiment.env, experiment.agent, experiment.seed, 1)
    learner.load(path)
    row = np.linspace(-1, 1, 9, dtype=np.float32)
    for one in (policy, learner.policy):
        one.seed(3)
    np.testing.assert_array_equal(policy.predict(row)[0], learner.policy.predict(row)[0])
    assert isinstance(policy.network, nn.Module)


# The loop


class RecordingPool:
    """Answers every job with an episode that did nothing."""

    def __init__(self, make_episode) -> None:
        self.jobs, self._make = [], make_episode

    def map(self, function, jobs):
        self.jobs.append(list(jobs))
        return [self._make([0.1], [[1]], np.zeros((1, 2)), accuracy=[0.4]) for _ in self.jobs[-1]]


def test_train_draws_rollouts_of_the_same_instance_with_seeds_of_their_own(make_episode):
    pool = RecordingPool(make_episode)
    learner = Reinforce(small_layout(), settings(updates=2), seed=0)
    metrics = list(learner.train(pool, TASK, "unknown-scale", 0))
    assert [update for update, _ in metrics] == [0, 1]
    for jobs in pool.jobs:
        instances = [instance for _, instance, _, _ in jobs]
        assert instances[0] == instances[1] != instances[2] == instances[3]
        assert not any(deterministic for *_, deterministic in jobs)
    seeds = [seed for jobs in pool.jobs for _, _, seed, _ in jobs]
    assert len(set(seeds)) == len(seeds) == 8
    assert metrics[1][1]["episodes"] == 8
    assert metrics[0][1]["return"] == pytest.approx(0.1)
    assert metrics[0][1]["accuracy"] == pytest.approx(0.4)
    assert metrics[0][1]["inner_steps"] == 8
    assert metrics[0][1]["validation_images"] == 400


def test_train_draws_the_same_jobs_when_it_starts_later(make_episode):
    whole, later = RecordingPool(make_episode), RecordingPool(make_episode)
    for pool, start in ((whole, 0), (later, 2)):
        list(Reinforce(small_layout(), settings(updates=4), 0).train(pool, TASK, "fixed", start))
    assert len(later.jobs) == 2
    for ours, theirs in zip(later.jobs, whole.jobs[2:], strict=True):
        assert [job[1:3] for job in ours] == [job[1:3] for job in theirs]


def test_train_lowers_the_entropy_bonus_from_start_to_end(make_episode, monkeypatch):
    weights = []
    monkeypatch.setattr(
        Reinforce, "update", lambda self, episodes, weight: weights.append(weight) or {}
    )
    learner = Reinforce(
        small_layout(), settings(updates=3, entropy_start=0.4, entropy_end=0.1), seed=0
    )
    list(learner.train(RecordingPool(make_episode), TASK, "fixed", 0))
    np.testing.assert_allclose(weights, [0.4, 0.25, 0.1])


def test_settings_count_their_episodes():
    assert settings(updates=5, instances_per_update=3, rollouts_per_instance=4).episodes == 60
