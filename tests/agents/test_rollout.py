import copy
import os

import numpy as np
import pytest
import torch

from agents import rollout
from agents.baselines import Cosine, Static
from agents.policy import RandomPolicy
from agents.rollout import RolloutPool, WorkerPool, run_controller, run_policy
from agents.rules import EarlyStopping
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance, published_test_instances
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
FIELDS = ("observations", "actions", "rewards", "multipliers", "progress", "ce", "kl", "accuracy")


def assert_same_episode(left, right):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert left.instance == right.instance
    assert (left.diverged, left.inner_steps) == (right.diverged, right.inner_steps)
    assert left.validation_images == right.validation_images


def weights(env: LayerwiseLREnv) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in env.trainer.optimizee.state_dict().values()]


def test_run_policy_records_every_env_step(env, instance):
    episode = run_policy(env, RandomPolicy(env.action_space), instance, seed=1, deterministic=False)
    width = env.observation_space.shape[0]
    assert episode.observations.shape == (3, width)
    assert episode.observations.dtype == np.float32
    assert episode.actions.shape == episode.multipliers.shape == (3, 5)
    for name in ("rewards", "ce", "kl", "accuracy"):
        assert getattr(episode, name).shape == (3,), name
    assert episode.rewards.dtype == episode.multipliers.dtype == np.float64
    np.testing.assert_array_equal(episode.progress, [0.0, 2 / 6, 4 / 6, 1.0])
    assert (episode.diverged, episode.inner_steps) == (False, 6)
    assert episode.instance == instance


def test_run_policy_records_what_a_hand_written_loop_sees(env, instance):
    policy = RandomPolicy(env.action_space)
    episode = run_policy(env, policy, instance, seed=1, deterministic=False)
    policy.seed(1)
    observation, _ = env.reset(options={"instance": instance})
    for step in range(3):
        np.testing.assert_array_equal(episode.observations[step], observation)
        action, _ = policy.predict(observation)
        np.testing.assert_array_equal(episode.actions[step], action)
        observation, reward, _, _, info = env.step(action)
        assert episode.rewards[step] == reward
        assert episode.accuracy[step] == info["accuracy/outer_valid"]
        assert (episode.ce[step], episode.kl[step]) == (info["loss/ce"], info["loss/kl"])
        np.testing.assert_array_equal(episode.multipliers[step], info["lr_multipliers"])


def test_run_policy_repeats_exactly_with_the_same_seed(env, instance):
    policy = RandomPolicy(env.action_space)
    first = run_policy(env, policy, instance, seed=1, deterministic=False)
    final = weights(env)
    other = run_policy(env, policy, instance, seed=2, deterministic=False)
    again = run_policy(env, policy, instance, seed=1, deterministic=False)
    assert_same_episode(first, again)
    assert all(torch.equal(a, b) for a, b in zip(final, weights(env), strict=True))
    assert not np.array_equal(first.actions, other.actions)


def test_run_policy_hands_the_state_back_and_marks_the_first_step(env, instance):
    calls = []

    class Recorder:
        def seed(self, seed):
            calls.append(("seed", seed))

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            calls.append((state, episode_start.tolist(), deterministic))
            return np.ones(5, dtype=np.int64), (state or 0) + 1

    run_policy(env, Recorder(), instance, seed=7, deterministic=True)
    assert calls == [
        ("seed", 7),
        (None, [True], True),
        (1, [False], True),
        (2, [False], True),
    ]


def test_run_policy_counts_the_images_of_reset_and_every_step(make_env, instance):
    for changes, images in (
        ({}, 50),
        ({"reward": {"gain": 1.0, "inner_valid_gain": 1.0}}, 550),
        ({"reward": "train_loss"}, 0),
        ({"reward": "train_loss", "observation": "extended"}, 500),
    ):
        env = make_env(**changes)
        policy = RandomPolicy(env.action_space)
        episode = run_policy(env, policy, instance, seed=1, deterministic=False)
        assert episode.validation_images == images * 4, changes


def test_run_controller_counts_the_images_that_a_rule_looks_at(make_env, instance):
    env = make_env()
    plain = run_controller(env, Static((0.01,) * 5), instance)
    watching = run_controller(env, EarlyStopping(0.01), instance)
    assert plain.validation_images == 50 * 4
    assert watching.validation_images == plain.validation_images + 2 * 500  # of inner_valid


def test_run_policy_keeps_no_accuracy_when_the_reward_reads_no_real_label(make_env, instance):
    env = make_env(reward="train_loss")
    policy = RandomPolicy(env.action_space)
    episode = run_policy(env, policy, instance, seed=1, deterministic=False)
    assert episode.accuracy.shape == (0,)
    assert np.isfinite(episode.rewards).all()


def test_run_policy_ends_early_and_finite_when_the_training_diverges(make_env, instance):
    env = make_env(base_lr=1e25, action="grid")

    class Full(RandomPolicy):
        def predict(self, *arguments, **keywords):
            return np.full(5, 6), None

    episode = run_policy(env, Full(env.action_space), instance, seed=1, deterministic=False)
    steps = len(episode.rewards)
    assert episode.diverged
    assert steps < 3
    assert episode.inner_steps == 2 * steps
    assert episode.validation_images == 50 * steps  # none after divergence
    assert episode.accuracy[-1] == 0
    for name in FIELDS:
        assert np.isfinite(getattr(episode, name)).all(), name


def test_run_controller_sets_exact_multipliers_off_the_grid(env, instance):
    vector = (0.123, 0.0, 0.7, 1e-4, 2.5)
    episode = run_controller(env, Static(vector), instance)
    np.testing.assert_array_equal(episode.multipliers, [vector] * 3)
    assert episode.actions.size == 0


def test_run_controller_does_not_depend_on_the_agents_encoding(make_env, instance):
    episodes = [
        run_controller(make_env(**changes), Static((0.1, 0.2, 0.3, 0.4, 0.5)), instance)
        for changes in ({}, {"action": "box"}, {"action": "grid", "observation": "asg"})
    ]
    for episode in episodes[1:]:
        np.testing.assert_array_equal(episodes[0].accuracy, episode.accuracy)
        np.testing.assert_array_equal(episodes[0].ce, episode.ce)


def test_run_controller_passes_progress_and_the_last_windows_telemetry(env, instance):
    seen = []

    class Recorder(Static):
        def multipliers(self, progress, telemetry):
            seen.append((progress, None if telemetry is None else telemetry.ce))
            return self.vector

    episode = run_controller(env, Recorder((0.1,) * 5), instance)
    assert seen == [(0.0, None), (2 / 6, episode.ce[0]), (4 / 6, episode.ce[1])]


def test_run_controller_begins_anew_for_every_episode(env, instance):
    controller = Cosine(1.0)
    assert_same_episode(
        run_controller(env, controller, instance), run_controller(env, controller, instance)
    )


def process_and_threads(env: LayerwiseLREnv) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def fail(env: LayerwiseLREnv, message: str) -> None:
    raise ValueError(message)


@pytest.fixture(scope="module")
def pool(make_settings):
    with RolloutPool(TASK, make_settings(), workers=2) as pool:
        yield pool


def test_rollout_pool_returns_results_in_the_order_of_the_jobs(pool, env):
    policy = RandomPolicy(env.action_space)
    listed = published_test_instances(TASK, "unknown-scale")[:4]
    jobs = [(policy, instance, seed, False) for seed, instance in enumerate(listed)]
    here = [run_policy(env, *copy.deepcopy(job)) for job in jobs]
    for ours, theirs in zip(here, pool.map(run_policy, jobs), strict=True):
        assert_same_episode(ours, theirs)


def test_rollout_pool_runs_in_other_processes_with_one_thread_each(pool):
    results = list(pool.map(process_and_threads, [()] * 8))
    assert os.getpid() not in {process for process, _ in results}
    assert {threads for _, threads in results} == {1}


def test_rollout_pool_raises_what_a_job_raises(pool):
    with pytest.raises(ValueError, match="^as it was$"):
        list(pool.map(fail, [("as it was",)]))


def test_episode_of_a_scaled_instance_trains_at_the_scaled_rate(make_env):
    # base_lr x scale x multiplier: the hidden factor is the same as a larger multiplier.
    env = make_env()
    scaled = run_controller(env, Static((0.1,) * 5), Instance(TASK, 1, 2, base_lr_scale=2.0))
    weights_scaled = weights(env)
    plain = run_controller(env, Static((0.2,) * 5), Instance(TASK, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(weights_scaled, weights(env), strict=True))
    np.testing.assert_array_equal(scaled.accuracy, plain.accuracy)
    np.testing.assert_array_equal(scaled.multipliers, 0.1)  # the nominal ones are shown


def exhaust(env: LayerwiseLREnv) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_rollout_pool_hands_on_that_the_device_is_full(pool):
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory"):
        list(pool.map(exhaust, [()]))


def test_rollout_pool_hands_on_why_an_environment_could_not_be_built(make_settings):
    with (
        RolloutPool(TASK, make_settings(outer_valid_size=1001), workers=1) as pool,
        pytest.raises(ConfigError, match=r"^`outer_valid_size` must be <= 1000 for ASG/Digits-v0"),
    ):
        list(pool.map(process_and_threads, [()]))


def test_rollout_pool_tells_each_worker_how_many_share_the_device(make_settings, monkeypatch):
    started = []
    monkeypatch.setattr(rollout, "ProcessPoolExecutor", lambda *_, **given: started.append(given))
    settings = make_settings()

    RolloutPool(TASK, settings, workers=3)

    build, arguments = started[0]["initargs"]
    assert (build, arguments) == (LayerwiseLREnv, (TASK, settings, None, 3))


# No workers: everything happens in this process


class Counted:
    """What a pool builds; counts how often."""

    built: list[tuple] = []

    def __init__(self, *arguments) -> None:
        self.built.append(arguments)


def process_and_arguments(built: Counted, job: int) -> tuple:
    return os.getpid(), built.built[-1], job


@pytest.fixture
def no_processes(monkeypatch):
    """No worker process can be started."""
    monkeypatch.setattr(rollout, "ProcessPoolExecutor", None)
    monkeypatch.setattr(rollout, "multiprocessing", None)


def test_worker_pool_without_workers_does_the_jobs_in_this_process_in_order(no_processes):
    Counted.built = []
    with WorkerPool(0, Counted, ("a", 1)) as pool:
        assert isinstance(pool.here, Counted)
        for jobs in ([(3,), (1,), (2,)], [(4,)], []):
            results = list(pool.map(process_and_arguments, jobs))
            assert results == [(os.getpid(), ("a", 1), job) for (job,) in jobs]
    assert Counted.built == [("a", 1)]  # once, for all jobs


def test_worker_pool_without_workers_leaves_the_thread_count_alone(no_processes):
    threads = torch.get_num_threads()
    with WorkerPool(0, Counted, ()) as pool:
        list(pool.map(process_and_arguments, [(1,)]))
    assert torch.get_num_threads() == threads


def test_worker_pool_without_workers_raises_what_a_job_raises(no_processes):
    with WorkerPool(0, Counted, ()) as pool:
        results = pool.map(fail, [("as it was",)])  # jobs are done as results are asked for
        with pytest.raises(ValueError, match="^as it was$"):
            next(results)
        assert list(pool.map(process_and_arguments, [(1,)]))  # and goes on


def test_worker_pool_without_workers_says_at_once_why_it_could_not_be_built(
    make_settings, no_processes
):
    with pytest.raises(ConfigError, match=r"^`outer_valid_size` must be <= 1000 for ASG/Digits-v0"):
        RolloutPool(TASK, make_settings(outer_valid_size=1001), workers=0)


def test_worker_pool_without_workers_hands_on_what_ends_it(no_processes):
    with pytest.raises(KeyboardInterrupt), WorkerPool(0, Counted, ()):
        raise KeyboardInterrupt


def test_rollout_pool_without_workers_has_the_device_to_itself(make_settings, monkeypatch):
    monkeypatch.setattr(rollout, "LayerwiseLREnv", Counted)
    Counted.built = []
    settings = make_settings()
    RolloutPool(TASK, settings, workers=0)
    assert Counted.built == [(TASK, settings, None, 1)]


def test_rollout_pool_without_workers_gives_the_episodes_of_workers(pool, env, make_settings):
    policy = RandomPolicy(env.action_space)
    listed = published_test_instances(TASK, "unknown-scale")[:3]
    jobs = [(policy, instance, seed, False) for seed, instance in enumerate(listed)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `train` does before it runs jobs here
    try:
        with RolloutPool(TASK, make_settings(), workers=0) as here:
            for ours, theirs in zip(
                here.map(run_policy, jobs), pool.map(run_policy, jobs), strict=True
            ):
                assert_same_episode(ours, theirs)
    finally:
        torch.set_num_threads(threads)
