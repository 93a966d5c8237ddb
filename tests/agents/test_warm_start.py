"""A policy that starts at the rates of a static search."""

import numpy as np
import pytest
import torch

from agents import reinforce, sequence_ppo, warm_start
from agents.benchmark.plan import Benchmark, BenchmarkSettings
from agents.episodic import Batch
from agents.recurrent_policy import RecurrentPolicy, layout_of
from agents.rollout import run_policy
from agents.run_folder import RunFolder, read_metrics, training_cost
from agents.search import SearchResult
from agents.train import train
from agents.warm_start import IMITATED, LEAST, SetPoint, WarmStart, imitate
from asg_env.actions import GRIDS, grid_levels, grid_positions
from asg_env.core.seeding import numpy_generator
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"
LEVELS = [3, 0, 1, 3, 1]
VECTOR = tuple(GRIDS["log"][level] for level in LEVELS)
# The heads of the per-feature network see where a group stands through one linear layer, which
# cannot tell "one level below" from "two levels below" as sharply as the controller does.
LEARNERS = [
    (reinforce.Learner, reinforce.ReinforceSettings, {"network": "per-feature"}, 0.1),
    (reinforce.Learner, reinforce.ReinforceSettings, {"network": "coordinate-wise"}, 0.02),
    (sequence_ppo.Learner, sequence_ppo.SequencePPOSettings, {}, 0.02),
]
MOVE, STAY = (np.exp(odds) / np.exp(odds).sum() for odds in ([0, -2, -4], [-2, 0, -2]))
UNIFORM = 0.4  # nats; the divergence of a policy that has learned nothing is above it


def entropy(probabilities):
    return -(probabilities * np.log(probabilities)).sum()


@pytest.fixture
def found(monkeypatch):
    """What the static search finds; the number of episodes that it was given is kept."""
    asked = []

    def search(pool, task, instances, grid, groups, budget, seed):
        asked.append(budget)
        assert pool.env.settings.observation == "scaled"  # no image is paid for to be observed
        return SearchResult(VECTOR, 0.5, budget - 1, 700, 30)

    monkeypatch.setattr(warm_start, "search", search)
    return asked


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch, inline_pool):
    monkeypatch.setattr(warm_start, "RolloutPool", inline_pool)


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_are_the_inverse_of_positions(grid):
    positions = grid_positions(GRIDS[grid], grid).astype(np.float32)
    np.testing.assert_array_equal(grid_levels(positions, grid), np.arange(len(GRIDS[grid])))


@pytest.mark.parametrize("action", ["relative", "grid"])
def test_set_point_takes_every_group_to_its_level_and_holds_it(make_env, instance, action):
    env = make_env(action=action, horizon=4)
    leader = SetPoint(LEVELS, layout_of(TASK, env.settings), env.settings)
    episode = run_policy(env, leader, instance, 0, deterministic=True)
    # From 0.01 no level is more than two steps away.
    steps = 1 if action == "relative" else 0
    np.testing.assert_allclose(episode.multipliers[steps:], [VECTOR] * (4 - steps))
    if action == "relative":
        assert tuple(episode.multipliers[0]) != VECTOR


def test_set_point_draws_as_often_as_its_probabilities_say(make_settings):
    env = make_settings()
    layout = layout_of(TASK, env)
    leader = SetPoint(LEVELS, layout, env)
    observation = np.zeros(layout.width, np.float32)
    probabilities = leader.probabilities(observation)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    # Position 0 is level 3: groups 0 and 3 are to stay, the others to go down.
    np.testing.assert_allclose(probabilities, [STAY, MOVE, MOVE, STAY, MOVE])
    leader.seed(1)
    drawn = np.array([leader.predict(observation)[0] for _ in range(4000)])
    shares = np.stack([(drawn == choice).mean(axis=0) for choice in range(3)], axis=1)
    np.testing.assert_allclose(shares, probabilities, atol=0.03)


@pytest.mark.parametrize(("learner", "settings", "changes", "apart"), LEARNERS)
def test_imitation_gives_the_wanted_probabilities_and_leaves_the_rest(
    make_env, instance, learner, settings, changes, apart
):
    env = make_env(horizon=6)
    values = validate(settings, {"hidden_size": 8, **changes}, "agent")
    network = learner(TASK, env.settings, values, 0, 0).policy.network
    layout = layout_of(TASK, env.settings)
    leader = SetPoint(LEVELS, layout, env.settings)
    batch = Batch.of([run_policy(env, leader, instance, seed, False) for seed in range(4)])
    wanted = leader.probabilities(batch.observations.numpy())
    critic = {n: p.clone() for n, p in network.named_parameters() if n.startswith("critic")}
    before = torch.get_rng_state()

    log_probs, _ = network(batch.observations, network.initial_state(4))
    uniform = (wanted * (np.log(wanted) - log_probs.detach().numpy())).sum(axis=-1).mean()
    assert uniform > UNIFORM
    assert imitate(network, batch, torch.from_numpy(wanted).float()) < apart

    assert torch.equal(torch.get_rng_state(), before)
    assert critic
    for name, parameter in network.named_parameters():
        assert not name.startswith("critic") or torch.equal(parameter, critic[name])
    policy = RecurrentPolicy(network)
    episode = run_policy(env, policy, instance, 0, deterministic=True)
    there = np.isclose(episode.multipliers[1:], VECTOR)
    assert there[0].all()
    assert there.mean() >= 0.9  # an imitation: a group may leave its level for a while


@pytest.mark.parametrize(("learner", "settings", "changes", "apart"), LEARNERS)
def test_training_begins_at_the_vector_and_counts_its_cost(
    make_settings, no_workers, found, learner, settings, changes, apart
):
    own = {"updates": 1, "hidden_size": 8, "warm_start_episodes": 30, **changes}
    if settings is reinforce.ReinforceSettings:
        own |= {"instances_per_update": 2, "rollouts_per_instance": 2}
    else:
        own |= {"episodes_per_update": 4, "episodes_per_minibatch": 2}
    values = validate(settings, own, "agent")
    assert values.episodes == 34
    training = learner(TASK, make_settings(), values, seed=0, workers=0)
    assert training.updates == 2
    (first, start), (second, update) = training.train(0)
    assert (first, second) == (0, 1)
    assert found == [30 - IMITATED]
    assert (start["episodes"], update["episodes"]) == (30, 34)
    per_episode = 3 * 2  # inner steps
    # The search spent one episode less than it might.
    assert start["inner_steps"] == 700 + (IMITATED + 1) * per_episode
    assert update["inner_steps"] == 4 * per_episode
    assert entropy(STAY) >= start["entropy"] >= entropy(MOVE)
    assert start["imitation_divergence"] < apart


def test_without_a_warm_start_nothing_is_searched(make_settings, no_workers, found):
    values = validate(reinforce.ReinforceSettings, {"updates": 1}, "agent")
    training = reinforce.Learner(TASK, make_settings(), values, seed=0, workers=0)
    assert training.updates == 1
    assert values.episodes == 32
    assert found == []


def test_training_goes_on_after_a_warm_start_to_the_same_bits(
    make_settings, no_workers, found, tmp_path
):
    own = {"updates": 2, "instances_per_update": 2, "rollouts_per_instance": 2}
    own |= {"warm_start_episodes": LEAST, "hidden_size": 8}
    values = validate(reinforce.ReinforceSettings, own, "agent")

    def make():
        return reinforce.Learner(TASK, make_settings(), values, seed=0, workers=0)

    whole = make()
    expected = list(whole.train(0))
    stopped = make()
    part = next(iter(stopped.train(0)))
    stopped.save(tmp_path / "last.safetensors", part[0])
    found.clear()
    resumed = make()
    rest = list(resumed.train(resumed.load(tmp_path / "last.safetensors")))
    assert [part, *rest] == expected
    assert found == []  # it is not searched a second time
    for name, value in whole.policy.network.state_dict().items():
        assert torch.equal(value, resumed.policy.network.state_dict()[name])


def test_imitated_is_the_best_of_the_vectors_that_were_tried(
    make_settings, inline_pool, monkeypatch
):
    levels = []
    monkeypatch.setattr(warm_start, "SetPoint", lambda *a: levels.append(a[0]) or SetPoint(*a))

    def score(scorer, candidates, instances):
        scorer.episodes += 4 * len(candidates)
        return {name: -controller.vector[4] for name, controller in candidates.items()}

    monkeypatch.setattr("agents.search.Scorer.score", score)
    settings = make_settings()
    values = validate(reinforce.ReinforceSettings, {"hidden_size": 4}, "agent")
    learner = reinforce.Learner(TASK, settings, values, 0, 0)
    WarmStart(TASK, settings, 100, 0, 0).run(learner.policy, inline_pool(TASK, settings))
    assert levels[0][4] == 0  # of 21 vectors at least one has the head at rest


def test_the_search_is_a_real_one(make_settings, inline_pool):
    settings = make_settings(horizon=2)
    values = validate(reinforce.ReinforceSettings, {"hidden_size": 4}, "agent")
    policies = []
    for seed in (0, 0, 1):
        learner = reinforce.Learner(TASK, settings, values, 0, 0)
        metrics = WarmStart(TASK, settings, 60, seed, 0).run(
            learner.policy, inline_pool(TASK, settings)
        )
        assert metrics["episodes"] == 60
        assert metrics["inner_steps"] <= 60 * 4
        policies.append(learner.policy.network.state_dict())
    first, same, other = policies
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_run_of_a_warm_started_agent_has_a_line_for_the_start(
    make_experiment, no_workers, found, tmp_path
):
    experiment = make_experiment(agent={"warm_start_episodes": LEAST, "updates": 1})
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    train(run, lambda *_: None)
    lines = read_metrics(run.seed_folder(0))
    assert [line["episodes"] for line in lines] == [LEAST, LEAST + 4]
    assert training_cost(run.seed_folder(0))["episodes"] == experiment.agent.episodes


@pytest.mark.parametrize(
    "settings", [reinforce.ReinforceSettings, sequence_ppo.SequencePPOSettings]
)
def test_too_few_episodes_are_refused(settings):
    with pytest.raises(ConfigError, match=r"`warm_start_episodes` must be 0 or >= 28, got 27;"):
        validate(settings, {"warm_start_episodes": 27}, "agent")


def test_observations_that_do_not_tell_levels_are_refused(make_settings):
    values = validate(reinforce.ReinforceSettings, {"warm_start_episodes": 30}, "agent")
    with pytest.raises(ConfigError, match="set env.observation=scaled or env.action=grid"):
        reinforce.Learner(TASK, make_settings(observation="asg"), values, 0, 0)
    reinforce.Learner(TASK, make_settings(observation="asg", action="grid"), values, 0, 0)


def test_rewards_that_read_no_real_labels_are_refused(make_settings):
    values = validate(reinforce.ReinforceSettings, {"warm_start_episodes": 30}, "agent")
    with pytest.raises(ConfigError, match="reads no real labels, because the search reads them"):
        reinforce.Learner(TASK, make_settings(reward={"inner_valid_gain": 1.0}), values, 0, 0)


def test_benchmark_takes_the_warm_start_out_of_the_budget():
    def experiment(episodes, warm):
        agent = {"kind": "reinforce", "warm_start_episodes": warm}
        settings = {
            "suites": ["digits-unknown-scale"],
            "agents": {"mine": {"agent": agent}},
            "episodes": episodes,
        }
        benchmark = Benchmark(validate(BenchmarkSettings, settings, "benchmark"))
        return benchmark.experiment("digits-unknown-scale", "mine").agent

    assert experiment(960, 480).updates == 15
    assert experiment(960, 480).episodes == 960
    assert experiment(960, 0).updates == 30
    message = "must be 100, which agent mine starts with, plus a multiple of 32, the episodes of an"
    with pytest.raises(ConfigError, match=message):
        experiment(960, 100)
    with pytest.raises(ConfigError, match="960, which agent mine starts with, plus a multiple of"):
        experiment(960, 960)


def test_draws_come_from_the_generator_of_the_seed(make_settings):
    env = make_settings()
    leader = SetPoint(LEVELS, layout_of(TASK, env), env)
    observation = numpy_generator(0, "test").normal(size=leader._layout.width).astype(np.float32)
    drawn = []
    for seed in (5, 5, 6):
        leader.seed(seed)
        drawn.append([tuple(leader.predict(observation)[0]) for _ in range(20)])
    assert drawn[0] == drawn[1] != drawn[2]
