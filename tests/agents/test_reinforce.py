import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.episodic import final_accuracy
from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import Layout
from agents.reinforce import (
    Learner,
    Reinforce,
    ReinforceSettings,
    advantages,
    load_policy,
    returns_to_go,
)
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"


def small_layout(shared: int = 2, groups: int = 1, actions: int = 3) -> Layout:
    """`shared` features, no features of the groups' own."""
    return Layout(tuple(range(shared)), ((),) * groups, actions)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**changes) -> ReinforceSettings:
    defaults = {
        "instances_per_update": 2,
        "rollouts_per_instance": 2,
        "hidden_size": 4,
        "passes": 1,
    }
    return validate(ReinforceSettings, {**defaults, **changes}, "agent")


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


def unrewarded(instance: int):
    return memory(instance)[0], lambda step, action: 0.0


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


# The coordinate-wise network


def test_settings_refuse_a_memoryless_coordinate_wise_network():
    sentence = "`memoryless` must be false with network coordinate-wise, got true; leave it out"
    with pytest.raises(ConfigError, match=sentence):
        settings(network="coordinate-wise", memoryless=True)
    with pytest.raises(ConfigError, match="`agent.network`"):
        settings(network="transformer")


@pytest.mark.parametrize("rewarded", [True, False])
def test_learner_with_the_coordinate_wise_network_solves_the_memory_probe(make_episode, rewarded):
    learner = Reinforce(
        small_layout(shared=1),
        settings(
            network="coordinate-wise",
            hidden_size=8,
            rollouts_per_instance=6,
            policy_lr=0.03,
            passes=4,
        ),
        seed=1,
    )
    assert isinstance(learner.policy.network, CoordinatewiseNetwork)
    fit_probe(learner, memory if rewarded else unrewarded, make_episode, 25 if rewarded else 2)
    solved = mean_return(learner, memory, make_episode)
    assert solved > 0.95 if rewarded else solved < 0.7


def test_update_leaves_the_value_head_of_the_coordinate_wise_network_alone(make_episode):
    learner = Reinforce(small_layout(), settings(network="coordinate-wise"), seed=0)
    before = copy.deepcopy(learner.policy.network.state_dict())
    learner.update(uneven_batch(make_episode, small_layout(), 2), 0.1)
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("critic"), name
