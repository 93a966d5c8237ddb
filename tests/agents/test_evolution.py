import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from agents.coordinatewise import CoordinatewiseNetwork
from agents.evolution import EvolutionSettings, EvolutionStrategy, centred_ranks
from agents.recurrent_policy import Layout
from agents.rollout import run_policy
from asg_env.core.seeding import torch_generator
from asg_env.instances import draw_instance
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"


def small_layout(shared: int = 1, groups: int = 1, actions: int = 3) -> Layout:
    """`shared` entries, none of the groups' own."""
    return Layout(tuple(range(shared)), ((),) * groups, actions)


def settings(**changes) -> EvolutionSettings:
    defaults = {"population": 4, "instances_per_update": 2, "hidden_size": 2}
    return validate(EvolutionSettings, {**defaults, **changes}, "agent")


def strategy(seed: int = 0, layout: Layout | None = None, **changes) -> EvolutionStrategy:
    return EvolutionStrategy(layout or small_layout(), settings(**changes), seed)


def weights_of(policy) -> torch.Tensor:
    """All weights that are learned: not those of the value head."""
    named = policy.network.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if not name.startswith("critic")])


def gradients_of(learner: EvolutionStrategy) -> torch.Tensor:
    named = learner.policy.network.named_parameters()
    return torch.cat([p.grad.flatten() for name, p in named if not name.startswith("critic")])


def judged(function, learner, make_episode, noise) -> list:
    """One-step episodes whose reward is a function of the candidate's weights."""
    return [
        make_episode([function(weights_of(policy))])
        for policy in learner.candidates(noise)
        for _ in range(learner.settings.instances_per_update)
    ]


# Ranks


@pytest.mark.parametrize(
    ("returns", "ranks"),
    [
        ([3.0, 1.0, 2.0], [0.5, -0.5, 0.0]),
        ([5.0, 5.0, 1.0, 9.0, 5.0], [0.0, 0.0, -0.5, 0.5, 0.0]),
        ([1.0, 1.0, 2.0, 2.0], [-1 / 3, -1 / 3, 1 / 3, 1 / 3]),
        ([7.0, 7.0, 7.0], [0.0, 0.0, 0.0]),
        ([-1e300, 1e300], [-0.5, 0.5]),
    ],
)
def test_ranks_by_hand(returns, ranks):
    np.testing.assert_allclose(centred_ranks(np.array([returns])), [ranks], atol=1e-12)


def test_ranks_count_the_smaller_and_half_of_the_other_equal_returns_of_an_instance():
    returns = np.random.default_rng(0).integers(6, size=(5, 16)).astype(float)
    smaller = (returns[:, None, :] < returns[:, :, None]).sum(axis=2)
    equal = (returns[:, None, :] == returns[:, :, None]).sum(axis=2)
    expected = (smaller + (equal - 1) / 2) / 15 - 0.5
    np.testing.assert_allclose(centred_ranks(returns), expected, atol=1e-12)
    np.testing.assert_allclose(centred_ranks(returns).sum(axis=1), 0, atol=1e-12)


def test_ranks_do_not_depend_on_the_scale_of_an_instance():
    returns = np.random.default_rng(0).normal(size=(2, 8))
    scaled = np.stack((np.exp(3 * returns[0]), 1000 + returns[1]))
    np.testing.assert_array_equal(centred_ranks(returns), centred_ranks(scaled))


# Candidates


def test_perturbations_follow_from_seed_and_update():
    learner = strategy(population=6)
    noise = learner.perturbations(3)
    assert noise.shape == (3, len(weights_of(learner.policy)))
    expected = torch.randn(noise.shape, generator=torch_generator(0, "perturbations", 3))
    assert torch.equal(noise, expected)
    assert torch.equal(strategy(population=6).perturbations(3), noise)
    assert not torch.equal(learner.perturbations(4), noise)
    assert not torch.equal(strategy(seed=1, population=6).perturbations(3), noise)


def test_candidates_are_every_positive_perturbation_then_every_negative_one():
    learner = strategy(population=6, noise=0.3)
    before = copy.deepcopy(learner.policy.network.state_dict())
    centre, noise = weights_of(learner.policy), learner.perturbations(0)
    candidates = learner.candidates(noise)
    assert len(candidates) == 6
    for index, policy in enumerate(candidates):
        sign = 1 if index < 3 else -1
        torch.testing.assert_close(weights_of(policy), centre + sign * 0.3 * noise[index % 3])
        for name, tensor in policy.network.state_dict().items():
            if name.startswith("critic"):
                assert torch.equal(tensor, before[name]), name
    with torch.no_grad():  # candidates share no memory with the policy, nor with one another
        for parameter in candidates[0].network.parameters():
            parameter.fill_(7.0)
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    torch.testing.assert_close(weights_of(candidates[3]), centre - 0.3 * noise[0])


# The gradient


def test_gradient_is_the_mean_rank_times_the_noise_over_all_candidates(make_episode):
    learner = strategy(population=6, noise=0.3)
    noise = learner.perturbations(0)
    returns = np.random.default_rng(0).normal(size=(6, 2))  # candidates x instances
    returns[:, 1] *= 100  # an instance with larger returns outweighs no other
    episodes = [make_episode([value / 2, value / 2]) for value in returns.flatten()]
    ranks = centred_ranks(returns.T).mean(axis=0)
    expected = torch.zeros(noise.shape[1])
    for rank, row in zip(ranks, torch.cat((noise, -noise)), strict=True):
        expected += float(rank) * row / (6 * 0.3)
    statistics = learner.update(episodes, noise)
    torch.testing.assert_close(gradients_of(learner), -expected)  # Adam descends
    assert statistics == {"entropy": 0.0, "grad_norm": pytest.approx(expected.norm().item())}


def test_gradient_of_a_linear_function_equals_the_closed_form(make_episode):
    # Ranks of a' w are uniform, Phi(z) - 1/2 of a normal z, and E[z (Phi(z) - 1/2)] is
    # 1 / (2 sqrt(pi)): along a / |a| the estimate tends to that over sigma, elsewhere to 0.
    learner = strategy(population=4000, instances_per_update=1, noise=0.3, hidden_size=1)
    noise = learner.perturbations(0)
    direction = torch.randn(noise.shape[1], generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    centre = weights_of(learner.policy)
    candidates = torch.cat((centre + 0.3 * noise, centre - 0.3 * noise))
    episodes = [make_episode([value]) for value in (candidates @ direction).tolist()]
    learner.update(episodes, noise)
    gradient = -0.3 * gradients_of(learner)
    expected = 1 / (2 * math.sqrt(math.pi))
    assert float(gradient @ direction) == pytest.approx(expected, rel=0.02)
    across = gradient - (gradient @ direction) * direction
    assert float(across.abs().max()) < 0.03  # 4.6 deviations of sqrt(1 / 12 / 2000 pairs)


def distance_left(make_episode, function_of_distance) -> float:
    """Share of the distance to a goal that is left when weights are judged by it."""
    learner = strategy(population=12, instances_per_update=1, policy_lr=0.03, noise=0.05)
    start = weights_of(learner.policy)
    goal = start + 0.3 * torch.randn(len(start), generator=torch.Generator().manual_seed(1))

    def judge(weights: torch.Tensor) -> float:
        return function_of_distance(float((weights - goal).square().sum()))

    for update in range(60):
        noise = learner.perturbations(update)
        learner.update(judged(judge, learner, make_episode, noise), noise)
    return float((weights_of(learner.policy) - goal).norm() / (start - goal).norm())


def test_strategy_climbs_a_quadratic(make_episode):
    assert distance_left(make_episode, lambda squared: -squared) < 0.3
    assert distance_left(make_episode, lambda squared: squared) > 1.5  # the control: downhill


def test_strategy_stands_still_where_all_candidates_do_equally_well(make_episode):
    learner = strategy()
    before = copy.deepcopy(learner.policy.network.state_dict())
    for update in range(3):
        noise = learner.perturbations(update)
        statistics = learner.update(judged(lambda _: 0.1, learner, make_episode, noise), noise)
        assert statistics["grad_norm"] == 0
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Probe problems: the answer is known, no network is trained on images


def bandit(instance: int):
    """Reward 1 for choosing action 2 in group 0; the other group does not matter."""
    return [[1.0]] * 2, lambda step, action: float(action[0] == 2)


def nothing(instance: int):
    return [[1.0]] * 2, lambda step, action: 0.0


def clock(instance: int):
    """Action 0 is right in the first half, action 2 in the second; all observations are equal."""
    return [[1.0]] * 6, lambda step, action: float(action[0] == (0 if step < 3 else 2))


class ProbePool:
    """Answers jobs of `run_policy` with greedy episodes of a probe; keeps the jobs."""

    def __init__(self, problem, make_episode) -> None:
        self.jobs, self._problem, self._make = [], problem, make_episode

    def map(self, function, jobs):
        assert function is run_policy
        self.jobs.append(list(jobs))
        return [self.play(policy, i.head_seed % 2) for policy, i, _, _ in self.jobs[-1]]

    def play(self, policy, instance: int):
        seen, reward = self._problem(instance)
        state, actions = None, []
        for step, observation in enumerate(seen):
            action, state = policy.predict(
                np.asarray(observation, np.float32), state, np.array([step == 0]), True
            )
            actions.append(action)
        rewards = [reward(step, action) for step, action in enumerate(actions)]
        return self._make(rewards, actions, seen, accuracy=[0.4])


def mean_return(learner: EvolutionStrategy, problem, make_episode) -> float:
    pool = ProbePool(problem, make_episode)
    return float(np.mean([pool.play(learner.policy, i).rewards.sum() for i in range(2)]))


def prefer_action_0(learner: EvolutionStrategy) -> None:
    with torch.no_grad():
        learner.policy.network.actor.bias[0] = 0.2


def test_strategy_solves_a_bandit(make_episode):
    learner = strategy(0, small_layout(groups=2), updates=15, population=16, noise=0.3)
    prefer_action_0(learner)
    assert mean_return(learner, bandit, make_episode) == 0
    list(learner.train(ProbePool(bandit, make_episode), TASK, "fixed", 0))
    assert mean_return(learner, bandit, make_episode) == 2


def test_strategy_does_not_solve_the_bandit_without_reward(make_episode):
    learner = strategy(0, small_layout(groups=2), updates=3, population=16, noise=0.3)
    prefer_action_0(learner)
    list(learner.train(ProbePool(nothing, make_episode), TASK, "fixed", 0))
    assert mean_return(learner, bandit, make_episode) == 0


class Forgetful(CoordinatewiseNetwork):
    """The control: every step starts from zeros."""

    memoryless = True


@pytest.mark.parametrize("remembers", [True, False])
def test_strategy_learns_to_tell_the_time_only_when_it_remembers(make_episode, remembers):
    learner = strategy(
        0, updates=30, instances_per_update=1, hidden_size=8, population=16, noise=0.3
    )
    if not remembers:
        learner.policy.network.__class__ = Forgetful
    list(learner.train(ProbePool(clock, make_episode), TASK, "fixed", 0))
    right = mean_return(learner, clock, make_episode)
    assert right > 3 if remembers else right == 3  # one action throughout is right in one half


# The loop


def test_train_judges_all_candidates_greedily_on_the_same_instances(make_episode):
    pool = ProbePool(bandit, make_episode)
    learner = strategy(layout=small_layout(groups=2), updates=2)
    centres, noises = [weights_of(learner.policy)], [learner.perturbations(u) for u in range(2)]
    metrics = []
    for line in learner.train(pool, TASK, "unknown-scale", 0):
        metrics.append(line)
        centres.append(weights_of(learner.policy))
    assert [update for update, _ in metrics] == [0, 1]
    for jobs, centre, noise in zip(pool.jobs, centres, noises, strict=False):
        instances = [instance for _, instance, _, _ in jobs]
        assert instances == instances[:2] * 4
        assert instances[0] != instances[1]
        assert {(seed, greedy) for *_, seed, greedy in jobs} == {(0, True)}
        for index, row in enumerate(torch.cat((noise, -noise))):
            for policy, *_ in jobs[2 * index : 2 * index + 2]:
                torch.testing.assert_close(weights_of(policy), centre + 0.1 * row)
    assert not set(pool.jobs[0][0][1:2]) & set(pool.jobs[1][0][1:2])
    last = metrics[1][1]
    assert list(last) == [
        *("episodes", "return", "accuracy", "diverged"),
        *("entropy", "grad_norm", "inner_steps", "validation_images"),
    ]
    assert (last["episodes"], last["accuracy"], last["entropy"]) == (16, pytest.approx(0.4), 0)
    assert (last["inner_steps"], last["validation_images"]) == (8 * 4, 8 * 150)


def test_train_draws_the_same_jobs_when_it_starts_later(make_episode):
    whole, later = ProbePool(bandit, make_episode), ProbePool(bandit, make_episode)
    for pool, start in ((whole, 0), (later, 2)):
        learner = strategy(layout=small_layout(groups=2), updates=4)
        list(learner.train(pool, TASK, "fixed", start))
    assert len(later.jobs) == 2
    for ours, theirs in zip(later.jobs, whole.jobs[2:], strict=True):
        assert [job[1:] for job in ours] == [job[1:] for job in theirs]


def test_training_cut_in_the_middle_ends_in_the_same_bits(make_episode):
    pool = ProbePool(clock, make_episode)
    whole, cut, resumed, network_only = (strategy(updates=6, noise=0.5) for _ in range(4))
    lines = list(whole.train(pool, TASK, "fixed", 0))
    first = list(itertools.islice(cut.train(pool, TASK, "fixed", 0), 3))
    kept = {name: tensor.clone() for name, tensor in cut.state().items()}
    resumed.load_state(kept)
    assert first + list(resumed.train(pool, TASK, "fixed", 3)) == lines
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, whole.state()[name]), name
    # The control: without the optimizer's moments it ends elsewhere.
    network_only.load_state({k: v for k, v in kept.items() if k.startswith("network/")})
    list(network_only.train(pool, TASK, "fixed", 3))
    assert not torch.equal(weights_of(network_only.policy), weights_of(whole.policy))


def test_value_head_is_never_trained(make_episode):
    learner = strategy(layout=small_layout(groups=2), updates=2, noise=0.5)
    before = copy.deepcopy(learner.policy.network.state_dict())
    list(learner.train(ProbePool(bandit, make_episode), TASK, "fixed", 0))
    assert isinstance(learner.policy.network, nn.Module)
    for name, tensor in learner.policy.network.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("critic"), name


def test_a_train_instance_is_of_the_set_that_was_asked_for(make_episode):
    pool = ProbePool(bandit, make_episode)
    list(strategy(layout=small_layout(groups=2), updates=1).train(pool, TASK, "mixed", 0))
    assert all(instance.horizon is not None for _, instance, _, _ in pool.jobs[0])
    fixed = draw_instance(TASK, "fixed", np.random.default_rng(0))
    assert fixed.horizon is None


# Settings


def test_settings_count_their_episodes():
    wanted = settings(updates=5, population=6, instances_per_update=3)
    assert (wanted.episodes_per_update, wanted.episodes) == (18, 90)
    assert validate(EvolutionSettings, {}, "agent").episodes == 960


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 5}, "`population` must be even, got 5; add 1"),
        ({"population": 0}, "`agent.population`"),
        ({"instances_per_update": 0}, "`agent.instances_per_update`"),
        ({"updates": 0}, "`agent.updates`"),
        ({"hidden_size": 0}, "`agent.hidden_size`"),
        ({"policy_lr": 0}, "`agent.policy_lr`"),
        ({"noise": 0}, "`agent.noise`"),
        ({"kind": "reinforce"}, "`agent.kind`"),
        ({"discount": 0.9}, "`agent.discount`"),
    ],
)
def test_settings_refuse_what_they_cannot_use(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)
