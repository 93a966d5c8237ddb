import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from agents import evolution, reinforce, sequence_ppo
from agents.episodic import (
    Batch,
    EpisodicLearner,
    clipped_credit,
    costs_of,
    draw_instances,
    final_accuracy,
    metrics_of,
    pack,
    rollout_jobs,
    unpack,
)
from agents.rollout import RolloutPool
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.instances import draw_instance
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"
# Each agent at its smallest: module, settings class, settings.
AGENTS = {
    "reinforce": (
        reinforce,
        reinforce.ReinforceSettings,
        {
            "network": "coordinate-wise",
            "instances_per_update": 1,
            "rollouts_per_instance": 2,
            "passes": 1,
        },
    ),
    "sequence-ppo": (
        sequence_ppo,
        sequence_ppo.SequencePPOSettings,
        {"episodes_per_update": 2, "episodes_per_minibatch": 2, "passes": 1},
    ),
    "es": (evolution, evolution.EvolutionSettings, {"population": 2, "instances_per_update": 1}),
}
KINDS = tuple(AGENTS)


def settings_of(kind: str, **changes):
    _, settings, values = AGENTS[kind]
    return validate(settings, {"hidden_size": 4, "updates": 2, **values, **changes}, "agent")


def learner_of(kind: str, env, seed: int = 0, workers: int = 0, **changes) -> EpisodicLearner:
    return AGENTS[kind][0].Learner(TASK, env, settings_of(kind, **changes), seed, workers)


def uneven(make_episode) -> list:
    draws = np.random.default_rng(1)
    return [
        make_episode(
            draws.normal(size=steps),
            draws.integers(3, size=(steps, 2)),
            draws.random((steps, 4)),
            accuracy=draws.random(steps),
            diverged=steps < 3,
        )
        for steps in (3, 1, 3, 2)
    ]


# Batches


def test_batch_puts_episodes_side_by_side_and_pads_with_zeros(make_episode):
    episodes = uneven(make_episode)
    batch = Batch.of(episodes)
    assert batch.observations.shape == (3, 4, 4)
    assert batch.observations.dtype == torch.float32
    assert batch.actions.shape == (3, 4, 2)
    assert batch.actions.dtype == torch.int64
    assert batch.running.tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]]
    for column, episode in enumerate(episodes):
        steps = len(episode.rewards)
        np.testing.assert_array_equal(batch.observations[:steps, column], episode.observations)
        np.testing.assert_array_equal(batch.actions[:steps, column], episode.actions)
        assert not batch.observations[steps:, column].any()
        assert not batch.actions[steps:, column].any()


def test_batch_columns_are_some_of_the_episodes_in_that_order(make_episode):
    batch = Batch.of(uneven(make_episode))
    part = batch.columns(torch.tensor([2, 0]))
    for name in ("observations", "actions", "running"):
        whole, some = getattr(batch, name), getattr(part, name)
        assert torch.equal(some[:, 0], whole[:, 2]), name
        assert torch.equal(some[:, 1], whole[:, 0]), name


def test_joint_log_prob_adds_up_the_groups(make_episode):
    batch = Batch.of([make_episode([0, 0], [[0, 2], [1, 1]], np.zeros((2, 1)))])
    log_probs = torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]] * 2)[:, None].log()
    expected = torch.tensor([[0.1 * 0.2], [0.2 * 0.3]]).log()
    torch.testing.assert_close(batch.joint_log_prob(log_probs), expected)


def test_means_are_over_the_steps_that_there_are(make_episode):
    batch = Batch.of(uneven(make_episode))
    values = torch.arange(12.0).reshape(3, 4)
    there = [0, 1, 2, 3, 4, 6, 7, 8, 10]
    assert batch.mean(values).item() == pytest.approx(np.mean(there))
    uniform = torch.full((3, 4, 2, 3), 1 / 3).log()
    assert batch.mean_entropy(uniform).item() == pytest.approx(np.log(3))
    certain = uniform.clone()
    certain[:, 1] = torch.tensor([1.0, 1e-30, 1e-30]).log()  # of 9 steps, one is certain
    assert batch.mean_entropy(certain).item() == pytest.approx(8 / 9 * np.log(3))
    certain[1:, 1] = uniform[1:, 1]  # after that episode's end: no matter
    assert batch.mean_entropy(certain).item() == pytest.approx(8 / 9 * np.log(3))


@pytest.mark.parametrize(
    ("ratio", "advantage", "credit", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),  # good and likely enough by now
        (0.5, 2.0, 1.0, 1.0),  # good, and still less likely than before
        (1.5, -2.0, -3.0, -3.0),  # bad, and still likelier than before
        (0.5, -2.0, -1.6, 0.0),  # bad and unlikely enough by now
        (0.9, -2.0, -1.8, -1.8),
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_credit_by_hand(ratio, advantage, credit, slope):
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    result = clipped_credit(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2)
    result.backward()
    assert result.item() == pytest.approx(credit)
    assert log_ratio.grad.item() == pytest.approx(slope)  # d ratio / d log ratio = ratio


# Draws


def test_instances_of_an_update_follow_from_seed_and_update():
    drawn = draw_instances(3, 5, TASK, "unknown-scale", 4)
    generator = numpy_generator(3, "train-instances", 5)
    assert drawn == [draw_instance(TASK, "unknown-scale", generator) for _ in range(4)]
    assert len(set(drawn)) == 4
    assert draw_instances(3, 5, TASK, "unknown-scale", 2) == drawn[:2]
    for other in ((4, 5), (3, 6)):
        assert not set(drawn) & set(draw_instances(*other, TASK, "unknown-scale", 4))


def test_rollout_jobs_are_instance_by_instance_with_seeds_of_their_own():
    policy, drawn = object(), draw_instances(0, 0, TASK, "fixed", 2)
    jobs = rollout_jobs(policy, 3, 5, drawn, 2)
    assert jobs == [
        (policy, drawn[i], derive_seed(3, "rollout", 5, i, j), False)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len({seed for _, _, seed, _ in jobs}) == 4


# Metrics


def test_metrics_and_costs_by_hand(make_episode):
    episodes = [
        make_episode([1.0, 2.0], accuracy=[0.3, 0.5]),
        make_episode([-5.0], accuracy=[0.1], diverged=True),
    ]
    assert metrics_of(episodes, 7) == {
        "episodes": 9,
        "return": pytest.approx((3 - 5) / 2),
        "accuracy": pytest.approx((0.5 + 0.1) / 2),
        "diverged": 0.5,
    }
    assert costs_of(episodes) == {"inner_steps": 4 + 2, "validation_images": 150 + 100}


def test_final_accuracy_is_zero_where_no_real_label_was_read(make_episode):
    assert final_accuracy(make_episode([0.0], accuracy=[0.25])) == 0.25
    assert final_accuracy(make_episode([0.0])) == 0.0


# Network and optimizer as tensors


def stepped(steps: int, seed: int = 0, learn_bias: bool = True):
    """A small network and its optimizer after some steps on random losses."""
    draws = torch.Generator().manual_seed(seed)
    network = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=draws)
    chosen = list(network.parameters()) if learn_bias else [network.weight]
    optimizer = torch.optim.Adam(chosen, lr=0.1)
    for step in range(steps):
        step_on(network, optimizer, step)
    return network, optimizer


def step_on(network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    network(torch.full((1, 3), 1.0 + step)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 2])
def test_unpack_takes_over_all_that_the_next_step_depends_on(steps):
    network, optimizer = stepped(steps)
    tensors = {name: tensor.clone() for name, tensor in pack(network, optimizer).items()}
    other, others_optimizer = stepped(3 if steps else 0, seed=1)
    unpack(tensors, other, others_optimizer)
    for step in range(3):
        step_on(network, optimizer, step)
        step_on(other, others_optimizer, step)
    for name, tensor in pack(network, optimizer).items():
        assert torch.equal(tensor, pack(other, others_optimizer)[name]), name


@pytest.mark.parametrize("ours_learns_bias", [True, False])
def test_unpack_refuses_the_moments_of_another_set_of_parameters(ours_learns_bias):
    tensors = pack(*stepped(2, learn_bias=not ours_learns_bias))
    network, optimizer = stepped(2, seed=1, learn_bias=ours_learns_bias)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"optimizer of \d parameters, here it has \d"):
        unpack(tensors, network, optimizer)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_holds_tensors_and_the_number_of_finished_updates(kind, make_settings, tmp_path):
    learner, path = learner_of(kind, make_settings()), tmp_path / "last.safetensors"
    learner.save(path, update=6)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]  # no temporary file
    fresh = learner_of(kind, make_settings(), seed=5)
    assert fresh.load(path) == 7
    for name, tensor in fresh.policy.network.state_dict().items():
        assert torch.equal(tensor, learner.policy.network.state_dict()[name]), name


def refusal(learner: EpisodicLearner, path) -> str:
    with pytest.raises(ConfigError, match="is no whole checkpoint of this agent") as caught:
        learner.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith("restore it from a copy or train anew")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_load_says_in_a_sentence_that_a_checkpoint_is_damaged(kind, make_settings, tmp_path):
    learner, path = learner_of(kind, make_settings()), tmp_path / "last.safetensors"
    learner.save(path, update=0)
    whole, tensors = path.read_bytes(), load_file(str(path))
    for share in (0.0, 0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        assert refusal(learner, path)
    save_file(tensors, str(path))  # without the number of updates
    assert refusal(learner, path)
    save_file(tensors, str(path), metadata={"updates": "many"})
    assert refusal(learner, path)
    missing = {name: t for name, t in tensors.items() if name != "network/actor.bias"}
    save_file(missing, str(path), metadata={"updates": "1"})
    assert refusal(learner, path)
    path.unlink()
    assert refusal(learner, path)


@pytest.mark.parametrize("kind", KINDS)
def test_load_refuses_the_checkpoint_of_another_network(kind, make_settings, tmp_path):
    path = tmp_path / "last.safetensors"
    learner_of(kind, make_settings(), hidden_size=5).save(path, update=0)
    assert refusal(learner_of(kind, make_settings()), path)
    # As many layer groups as one likes, but not other entries of each.
    learner_of(kind, make_settings(observation="extended")).save(path, update=0)
    assert refusal(learner_of(kind, make_settings()), path)


def test_load_refuses_the_checkpoint_of_another_agent_with_the_same_network(
    make_settings, make_episode, tmp_path
):
    # sequence-ppo trains its value head; the others leave theirs alone.
    path, env = tmp_path / "last.safetensors", make_settings()
    draws = np.random.default_rng(0)
    episodes = [
        make_episode([r], draws.integers(3, size=(1, 5)), draws.random((1, 9))) for r in (0.0, 1.0)
    ]
    trained = learner_of("sequence-ppo", env)
    trained._algorithm.update(episodes, 0)
    trained.save(path, update=0)
    assert trained.load(path) == 1
    for kind in ("reinforce", "es"):
        assert "optimizer of 8 parameters, here it has 6" in refusal(learner_of(kind, env), path)
    trained = learner_of("reinforce", env)
    trained._algorithm.update(episodes, 0.0)
    trained.save(path, update=0)
    assert "optimizer of 6 parameters, here it has 8" in refusal(
        learner_of("sequence-ppo", env), path
    )


@pytest.mark.parametrize("kind", KINDS)
def test_load_policy_acts_as_the_learner_that_was_saved(kind, make_settings, tmp_path):
    path, env = tmp_path / "last.safetensors", make_settings()
    learner = learner_of(kind, env, seed=4)
    with torch.no_grad():
        for parameter in learner.policy.network.parameters():
            parameter.mul_(3.0)
    learner.save(path, update=0)
    module = AGENTS[kind][0]
    experiment = SimpleNamespace(
        task=TASK, env=env, agent=settings_of(kind), seed=0, agent_module=module
    )
    policy = module.load_policy(path, experiment)
    for name, tensor in policy.network.state_dict().items():
        assert torch.equal(tensor, learner.policy.network.state_dict()[name]), name
    row = np.linspace(-1, 1, 9, dtype=np.float32)
    for one in (policy, learner.policy):
        one.seed(3)
    np.testing.assert_array_equal(policy.predict(row)[0], learner.policy.predict(row)[0])


# Training on a real environment


@pytest.fixture(scope="module")
def two_workers(make_settings):
    with RolloutPool(TASK, make_settings(), workers=2) as pool:
        yield pool


@pytest.fixture
def one_thread():
    """As `train` sets it: bits change with the thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_in_the_same_bytes_with_no_worker_and_with_two(
    kind, make_settings, two_workers, one_thread, tmp_path
):
    env = make_settings(instances="unknown-scale")
    here, there = learner_of(kind, env, workers=0), learner_of(kind, env, workers=2)
    before = copy.deepcopy(here._algorithm.state())
    metrics = list(here.train(0))
    assert [update for update, _ in metrics] == [0, 1]
    algorithm = there._algorithm
    assert list(algorithm.train(two_workers, TASK, "unknown-scale", 0)) == metrics
    for learner, name in ((here, "here"), (there, "there")):
        learner.save(tmp_path / name, update=1)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    name = "network/actor.weight"
    assert not torch.equal(here._algorithm.state()[name], before[name])  # else it shows nothing


@pytest.mark.parametrize("kind", KINDS)
def test_training_cut_in_the_middle_ends_in_the_same_bytes(
    kind, make_settings, one_thread, tmp_path
):
    env = make_settings(instances="unknown-scale")
    whole, cut = learner_of(kind, env), learner_of(kind, env)
    lines = list(whole.train(0))
    first = next(iter(cut.train(0)))
    cut.save(tmp_path / "cut", update=0)
    resumed = learner_of(kind, env, seed=0)
    assert resumed.load(tmp_path / "cut") == 1
    assert [first, *resumed.train(1)] == lines
    whole.save(tmp_path / "whole", update=1)
    resumed.save(tmp_path / "resumed", update=1)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
