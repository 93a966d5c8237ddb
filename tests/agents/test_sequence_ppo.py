import copy
import itertools

import numpy as np
import pytest
import torch

from agents.coordinatewise import CoordinatewiseNetwork
from agents.episodic import Batch
from agents.recurrent_policy import Layout
from agents.sequence_ppo import SequencePPO, SequencePPOSettings, generalised_advantages
from asg_env.core.seeding import numpy_generator
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"


def small_layout(shared: int = 2, groups: int = 1, actions: int = 3) -> Layout:
    """`shared` entries, none of the groups' own."""
    return Layout(tuple(range(shared)), ((),) * groups, actions)


def settings(**changes) -> SequencePPOSettings:
    defaults = {
        "episodes_per_update": 4,
        "episodes_per_minibatch": 4,
        "hidden_size": 4,
        "passes": 1,
    }
    return validate(SequencePPOSettings, {**defaults, **changes}, "agent")


# Advantages


def column(rewards, values, discount: float, gae_lambda: float) -> np.ndarray:
    """Advantages of a single episode."""
    return generalised_advantages(
        [np.asarray(rewards, float)], np.asarray(values, float)[:, None], discount, gae_lambda
    )[:, 0]


def test_advantages_follow_the_recurrence_by_hand():
    r, v, d, lam = (1.0, 2.0, 3.0), (0.5, 0.25, 0.125), 0.9, 0.8
    last = r[2] - v[2]  # the episode terminates: nothing is worth anything after it
    middle = (r[1] + d * v[2] - v[1]) + d * lam * last
    first = (r[0] + d * v[1] - v[0]) + d * lam * middle
    np.testing.assert_allclose(column(r, v, d, lam), [first, middle, last])
    # The control: credit for what V says of the time after the end must miss it.
    assert not np.isclose(r[2] + d * v[2] - v[2], last)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_advantages_of_constant_rewards_equal_the_closed_form(discount, gae_lambda):
    steps, rate = 12, discount * gae_lambda
    left = steps - np.arange(steps)
    geometric = left if rate == 1 else (1 - rate**left) / (1 - rate)
    np.testing.assert_allclose(
        column(np.ones(steps), np.zeros(steps), discount, gae_lambda), geometric
    )
    # With V = 2 throughout, delta is 1 + 2 d - 2, but 1 - 2 at the last step.
    delta, end = 2 * discount - 1, -1.0
    expected = delta * (geometric - rate ** (left - 1)) + end * rate ** (left - 1.0)
    np.testing.assert_allclose(
        column(np.ones(steps), np.full(steps, 2.0), discount, gae_lambda), expected, atol=1e-12
    )


def test_advantages_with_lambda_0_are_one_step_differences():
    draws = np.random.default_rng(0)
    rewards, values = draws.normal(size=6), draws.normal(size=6)
    expected = rewards + 0.9 * np.append(values[1:], 0) - values
    np.testing.assert_allclose(column(rewards, values, 0.9, 0.0), expected)


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_advantages_with_lambda_1_are_returns_less_values(discount):
    draws = np.random.default_rng(0)
    rewards, values = draws.normal(size=6), draws.normal(size=6)
    returns = [sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(6)]
    np.testing.assert_allclose(column(rewards, values, discount, 1.0), returns - values)


def test_advantages_are_zero_for_values_that_are_right():
    rewards = np.array([1.0, 2.0, 3.0])
    for gae_lambda in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(column(rewards, [6.0, 5.0, 3.0], 1.0, gae_lambda), 0, atol=1e-12)


def test_advantages_of_episodes_side_by_side_are_those_of_each_alone():
    draws = np.random.default_rng(0)
    rewards = [draws.normal(size=steps) for steps in (3, 1, 5)]
    values = draws.normal(size=(5, 3)) + 100  # what stands after an end is not read either
    together = generalised_advantages(rewards, values, 0.9, 0.8)
    for index, row in enumerate(rewards):
        alone = column(row, values[: len(row), index], 0.9, 0.8)
        np.testing.assert_allclose(together[: len(row), index], alone)
        np.testing.assert_array_equal(together[len(row) :, index], 0)


# The update


LAYOUT = Layout((0, 1), ((2,), (3,)), 3)


def uneven_episodes(make_episode, layout: Layout = LAYOUT, width: int = 4, scale: float = 1.0):
    draws = np.random.default_rng(1)
    return [
        make_episode(
            scale * draws.normal(size=steps),
            draws.integers(layout.actions, size=(steps, len(layout.per_group))),
            draws.random((steps, width)),
        )
        for steps in (3, 1, 3, 2)
    ]


def alone(network: CoordinatewiseNetwork, episode):
    """Log-probabilities of the actions taken, entropies of a group's choice, and values."""
    state = network.initial_state(1)
    chosen, entropies, values = [], [], []
    for observation, action in zip(episode.observations, episode.actions, strict=True):
        log_probs, value, state = network.unroll(torch.from_numpy(observation)[None, None], state)
        chosen.append(sum(log_probs[0, 0, g, int(choice)] for g, choice in enumerate(action)))
        entropies.append(-(log_probs.exp() * log_probs)[0, 0].sum(dim=-1).mean())
        values.append(value[0, 0])
    return torch.stack(chosen), torch.stack(entropies), torch.stack(values)


def hand_update(network, optimizer, episodes, wanted, minibatches, bound):
    """PPO written out over single episodes; returns statistics of every gradient step."""
    with torch.no_grad():
        before = [alone(network, episode) for episode in episodes]
    raw, targets = [], []
    for episode, (_, _, values) in zip(episodes, before, strict=True):
        v = [*values.tolist(), 0.0]
        advantage, row = 0.0, []
        for t in reversed(range(len(episode.rewards))):
            delta = episode.rewards[t] + wanted.discount * v[t + 1] - v[t]
            advantage = delta + wanted.discount * wanted.gae_lambda * advantage
            row.insert(0, advantage)
        raw.append(row)
        targets.append([a + value for a, value in zip(row, v, strict=False)])
    everything = np.concatenate(raw)
    steps = []
    for minibatch in minibatches:
        credits, errors, entropies = [], [], []
        for index in minibatch:
            chosen, entropy, values = alone(network, episodes[index])
            for t in range(len(chosen)):
                advantage = (raw[index][t] - everything.mean()) / (everything.std() + 1e-8)
                ratio = (chosen[t] - before[index][0][t]).exp()
                clipped = ratio.clamp(1 - wanted.clip_ratio, 1 + wanted.clip_ratio)
                credits.append(torch.minimum(ratio * advantage, clipped * advantage))
                errors.append((values[t] - targets[index][t]) ** 2)
                entropies.append(entropy[t])
        credit, error, entropy = (torch.stack(x).mean() for x in (credits, errors, entropies))
        groups = episodes[0].actions.shape[1]
        loss = -credit + wanted.value_weight * error - wanted.entropy * groups * entropy
        optimizer.zero_grad()
        loss.backward()
        squares = sum(p.grad.square().sum() for p in network.parameters())
        norm = float(squares) ** 0.5
        for parameter in network.parameters():
            parameter.grad *= min(1.0, bound / (norm + 1e-6))
        optimizer.step()
        steps.append((entropy.item(), error.item(), norm))
    return steps


def test_update_of_one_batch_follows_the_loss_written_out_over_single_episodes(make_episode):
    wanted = settings(max_grad_norm=1e9, discount=0.9, gae_lambda=0.8, entropy=0.1)
    learner = SequencePPO(LAYOUT, wanted, seed=0)
    network = copy.deepcopy(learner.policy.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=wanted.policy_lr, eps=1e-5)
    episodes = uneven_episodes(make_episode)
    ((entropy, error, norm),) = hand_update(
        network, optimizer, episodes, wanted, [range(4)], wanted.max_grad_norm
    )
    statistics = learner.update(episodes, 0)
    for hand, ours in zip(network.parameters(), learner.policy.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, hand.grad, atol=1e-6, rtol=1e-4)
    assert statistics == {
        "entropy": pytest.approx(entropy, abs=1e-5),
        "value_loss": pytest.approx(error, rel=1e-4),
        "grad_norm": pytest.approx(norm, rel=1e-4),
    }


def test_update_in_minibatches_and_passes_follows_the_loop_over_single_episodes(make_episode):
    wanted = settings(
        episodes_per_minibatch=2,
        passes=5,
        policy_lr=0.02,  # so that ratios leave the clipped region
        clip_ratio=0.05,
        max_grad_norm=0.5,
    )
    learner = SequencePPO(LAYOUT, wanted, seed=3)
    network = copy.deepcopy(learner.policy.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=wanted.policy_lr, eps=1e-5)
    episodes = uneven_episodes(make_episode)
    generator = numpy_generator(3, "minibatches", 7)
    orders = [generator.permutation(4) for _ in range(5)]
    minibatches = [part for order in orders for part in (order[:2], order[2:])]
    steps = hand_update(network, optimizer, episodes, wanted, minibatches, wanted.max_grad_norm)
    statistics = learner.update(episodes, 7)
    ours = learner.policy.network.state_dict()
    for name, hand in network.state_dict().items():
        torch.testing.assert_close(ours[name], hand, atol=2e-4, rtol=1e-3)
    entropy, error, norm = np.mean(steps[-2:], axis=0)  # of the last pass
    assert statistics == {
        "entropy": pytest.approx(entropy, abs=1e-4),
        "value_loss": pytest.approx(error, rel=1e-2),
        "grad_norm": pytest.approx(norm, rel=1e-2),
    }
    # The control: the order of another update ends elsewhere.
    other = SequencePPO(LAYOUT, wanted, seed=3)
    other.update(episodes, 8)
    assert any(
        (other.policy.network.state_dict()[name] - hand).abs().max() > 2e-3
        for name, hand in ours.items()
    )


def test_update_ignores_what_stands_after_an_episodes_end(make_episode, monkeypatch):
    def gradients() -> list[torch.Tensor]:
        learner = SequencePPO(LAYOUT, settings(max_grad_norm=1e9, entropy=0.1), seed=0)
        learner.update(uneven_episodes(make_episode), 0)
        return [p.grad for p in learner.policy.network.parameters()]

    clean, of = gradients(), Batch.of
    padded = []

    def dirty(episodes) -> Batch:
        batch = of(episodes)
        over = batch.running == 0
        batch.observations[over] = 9.0
        batch.actions[over] = 2
        padded.append(int(over.sum()))
        return batch

    monkeypatch.setattr(Batch, "of", dirty)
    for left, right in zip(clean, gradients(), strict=True):
        assert torch.equal(left, right)
    assert padded == [3]


def test_update_does_not_depend_on_the_order_of_whole_batches(make_episode):
    results = []
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        learner = SequencePPO(LAYOUT, settings(max_grad_norm=1e9), seed=0)
        episodes = uneven_episodes(make_episode)
        learner.update([episodes[i] for i in order], 0)
        results.append([p.grad for p in learner.policy.network.parameters()])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


def test_update_bounds_the_gradient_norm(make_episode):
    learner = SequencePPO(LAYOUT, settings(max_grad_norm=1e-3), seed=0)
    statistics = learner.update(uneven_episodes(make_episode), 0)
    squares = sum(p.grad.square().sum() for p in learner.policy.network.parameters())
    assert statistics["grad_norm"] > 1e-2
    assert float(squares) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def without_values(learner: SequencePPO) -> SequencePPO:
    """A value head that says 0 everywhere."""
    with torch.no_grad():
        learner.policy.network.critic.weight.zero_()
    return learner


def test_update_changes_nothing_without_reward_value_and_entropy_bonus(make_episode):
    learner = without_values(SequencePPO(LAYOUT, settings(entropy=0.0, passes=3), seed=0))
    before = copy.deepcopy(learner.policy.network.state_dict())
    learner.update(uneven_episodes(make_episode, scale=0.0), 0)
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_update_raises_entropy_when_only_the_bonus_pulls(make_episode):
    learner = without_values(SequencePPO(LAYOUT, settings(entropy=0.1, policy_lr=0.05), seed=0))
    with torch.no_grad():
        learner.policy.network.actor.weight.normal_(
            0, 2, generator=torch.Generator().manual_seed(5)
        )
    episodes = uneven_episodes(make_episode, scale=0.0)
    entropies = [learner.update(episodes, update)["entropy"] for update in range(10)]
    assert entropies[-1] > entropies[0] + 0.01


def test_update_keeps_the_policy_near_when_the_ratio_is_clipped(make_episode):
    layout = small_layout()
    episodes = [make_episode([float(i == 0)], [[i]], np.ones((1, 2))) for i in (0, 1)]

    def probability_after(clip_ratio: float) -> float:
        wanted = settings(
            episodes_per_update=2,
            episodes_per_minibatch=2,
            passes=300,
            clip_ratio=clip_ratio,
            policy_lr=0.004,
            entropy=0.0,
            value_weight=0.0,
        )
        learner = SequencePPO(layout, wanted, seed=0)
        learner.update(episodes, 0)
        network = learner.policy.network
        log_probs, _ = network(torch.ones(1, 1, 2), network.initial_state(1))
        return log_probs[0, 0, 0, 0].exp().item()

    assert 0.36 < probability_after(0.2) < 0.5
    assert probability_after(1e6) > 0.9  # the control


# Probe problems: the answer is known, no network is trained on images


def bandit(instance: int):
    """Reward 1 for choosing action 2 in group 0; the other group does not matter."""
    return [[1.0, 0.5]] * 2, lambda step, action: float(action[0] == 2)


def another_bandit(instance: int):
    """Reward 1 for choosing action 0 in group 1."""
    return [[1.0, 0.5]] * 2, lambda step, action: float(action[1] == 0)


def memory(instance: int):
    """A cue at the first step alone says which action is right at the last one."""
    cue = 1.0 if instance else -1.0
    right = 2 if instance else 0
    return [[cue], [0.0], [0.0]], lambda step, action: float(step == 2 and action[0] == right)


def play(policy, problem, make_episode, instance: int, seed: int):
    """Run the policy on `problem(instance) -> (observations, reward of (step, action))`."""
    seen, reward = problem(instance)
    policy.seed(seed)
    state, actions = None, []
    for step, observation in enumerate(seen):
        action, state = policy.predict(
            np.asarray(observation, np.float32), state, np.array([step == 0])
        )
        actions.append(action)
    rewards = [reward(step, action) for step, action in enumerate(actions)]
    return make_episode(rewards, actions, seen, accuracy=[0.4])


class ProbePool:
    """Answers jobs of `run_policy` with episodes of a probe; keeps the jobs."""

    def __init__(self, problem, make_episode) -> None:
        self.jobs, self._problem, self._make = [], problem, make_episode

    def map(self, function, jobs):
        self.jobs.append(list(jobs))
        return [
            play(policy, self._problem, self._make, instance.head_seed % 2, seed)
            for policy, instance, seed, _ in self.jobs[-1]
        ]


def mean_return(learner: SequencePPO, problem, make_episode) -> float:
    episodes = [play(learner.policy, problem, make_episode, i % 2, 10**6 + i) for i in range(80)]
    return float(np.mean([episode.rewards.sum() for episode in episodes]))


def probe_learner(layout: Layout, updates: int) -> SequencePPO:
    wanted = settings(
        updates=updates,
        episodes_per_update=24,
        episodes_per_minibatch=12,
        hidden_size=8,
        policy_lr=0.02,
        passes=4,
    )
    return SequencePPO(layout, wanted, seed=1)


def fit_probe(learner: SequencePPO, problem, make_episode) -> list[dict[str, float]]:
    pool = ProbePool(problem, make_episode)
    return [metrics for _, metrics in learner.train(pool, TASK, "fixed", 0)]


def test_learner_solves_a_bandit_and_learns_what_it_is_worth(make_episode):
    learner = probe_learner(small_layout(groups=2), updates=20)
    assert mean_return(learner, bandit, make_episode) < 0.9  # 2/3 by chance
    metrics = fit_probe(learner, bandit, make_episode)
    assert mean_return(learner, bandit, make_episode) > 1.9
    assert metrics[-1]["value_loss"] < 0.1 < metrics[0]["value_loss"]
    assert metrics[-1]["entropy"] < metrics[0]["entropy"]


def test_learner_solves_the_bandit_that_it_was_trained_on_alone(make_episode):
    learner = probe_learner(small_layout(groups=2), updates=20)
    fit_probe(learner, another_bandit, make_episode)
    assert mean_return(learner, another_bandit, make_episode) > 1.9
    assert mean_return(learner, bandit, make_episode) < 1.5


class Forgetful(CoordinatewiseNetwork):
    """The control: every step starts from zeros, in acting and in updating alike."""

    memoryless = True  # in acting

    def unroll(self, observations, state):
        steps = [super(Forgetful, self).unroll(o[None], 0 * state) for o in observations]
        log_probs, values, _ = (list(parts) for parts in zip(*steps, strict=True))
        return torch.cat(log_probs), torch.cat(values), steps[-1][2]


@pytest.mark.parametrize("remembers", [True, False])
def test_learner_solves_the_memory_probe_only_when_it_remembers(make_episode, remembers):
    learner = probe_learner(small_layout(shared=1), updates=30)
    if not remembers:
        learner.policy.network.__class__ = Forgetful
    fit_probe(learner, memory, make_episode)
    solved = mean_return(learner, memory, make_episode)
    assert solved > 0.95 if remembers else solved < 0.7  # 1/2 without the cue


# The loop


def test_train_draws_an_episode_of_an_instance_each(make_episode):
    pool = ProbePool(bandit, make_episode)
    learner = SequencePPO(small_layout(groups=2), settings(updates=2), seed=0)
    metrics = list(learner.train(pool, TASK, "unknown-scale", 0))
    assert [update for update, _ in metrics] == [0, 1]
    jobs = [job for of_update in pool.jobs for job in of_update]
    assert len({instance for _, instance, _, _ in jobs}) == len(jobs) == 8
    assert len({seed for _, _, seed, _ in jobs}) == 8
    assert all(policy is learner.policy for policy, *_ in jobs)
    assert not any(deterministic for *_, deterministic in jobs)
    assert {instance.base_lr_scale == 1.0 for _, instance, _, _ in jobs} == {False}
    last = metrics[1][1]
    assert list(last) == [
        *("episodes", "return", "accuracy", "diverged"),
        *("entropy", "value_loss", "grad_norm", "inner_steps", "validation_images"),
    ]
    assert (last["episodes"], last["accuracy"], last["diverged"]) == (8, pytest.approx(0.4), 0)
    assert (last["inner_steps"], last["validation_images"]) == (4 * 4, 4 * 150)


def test_train_draws_the_same_jobs_when_it_starts_later(make_episode):
    whole, later = ProbePool(bandit, make_episode), ProbePool(bandit, make_episode)
    for pool, start in ((whole, 0), (later, 2)):
        learner = SequencePPO(small_layout(groups=2), settings(updates=4), seed=0)
        list(learner.train(pool, TASK, "fixed", start))
    assert len(later.jobs) == 2
    for ours, theirs in zip(later.jobs, whole.jobs[2:], strict=True):
        assert [job[1:3] for job in ours] == [job[1:3] for job in theirs]


def test_training_cut_in_the_middle_ends_in_the_same_bits(make_episode):
    wanted = settings(updates=4, episodes_per_minibatch=2, passes=2)

    def learner(seed: int = 0) -> SequencePPO:
        return SequencePPO(small_layout(shared=1), wanted, seed)

    whole, cut = learner(), learner()
    pool = ProbePool(memory, make_episode)
    lines = list(whole.train(pool, TASK, "fixed", 0))
    first = list(itertools.islice(cut.train(pool, TASK, "fixed", 0), 2))
    resumed = learner()
    resumed.load_state({name: tensor.clone() for name, tensor in cut.state().items()})
    assert first + list(resumed.train(pool, TASK, "fixed", 2)) == lines
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, whole.state()[name]), name
    # The control: without the optimizer's moments it ends elsewhere.
    network_only = learner()
    network_only.load_state({k: v.clone() for k, v in cut.state().items() if "network/" in k})
    list(network_only.train(pool, TASK, "fixed", 2))
    name = "network/actor.weight"
    assert not torch.equal(network_only.state()[name], whole.state()[name])


# Settings


def test_settings_count_their_episodes():
    assert settings(updates=5, episodes_per_update=12).episodes == 60
    assert validate(SequencePPOSettings, {}, "agent").episodes == 960


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"episodes_per_minibatch": 3},
            r"`episodes_per_minibatch` must divide episodes_per_update \(4\), got 3; change one",
        ),
        ({"episodes_per_minibatch": 8}, r"must divide episodes_per_update \(4\), got 8"),
        ({"episodes_per_update": 1}, "`agent.episodes_per_update`"),
        ({"episodes_per_minibatch": 1}, "`agent.episodes_per_minibatch`"),
        ({"updates": 0}, "`agent.updates`"),
        ({"hidden_size": 0}, "`agent.hidden_size`"),
        ({"policy_lr": 0}, "`agent.policy_lr`"),
        ({"discount": 1.1}, "`agent.discount`"),
        ({"gae_lambda": -0.1}, "`agent.gae_lambda`"),
        ({"entropy": -1}, "`agent.entropy`"),
        ({"value_weight": -1}, "`agent.value_weight`"),
        ({"passes": 0}, "`agent.passes`"),
        ({"clip_ratio": 0}, "`agent.clip_ratio`"),
        ({"max_grad_norm": 0}, "`agent.max_grad_norm`"),
        ({"kind": "reinforce"}, "`agent.kind`"),
        ({"memoryless": True}, "`agent.memoryless`"),
    ],
)
def test_settings_refuse_what_they_cannot_use(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)
