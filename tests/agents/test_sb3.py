import copy
import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import asg_env  # noqa: F401 - registers the environments
from agents.experiment import Experiment, RunFolder, load_experiment
from agents.rollout import Episode, RolloutPool, run_policy
from agents.sb3 import CHECKPOINT, Learner, PPOSettings, load_policy, spaces_of
from agents.train import load_policies, train
from asg_env.config import ConfigError, EnvSettings, validate
from asg_env.instances import published_test_instances

TASK = "ASG/Digits-v0"
TINY_ENV = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50, "observation": "scaled"}
PROBE_ENV = EnvSettings(horizon=3, observation="scaled")
TINY_AGENT = {
    "kind": "ppo", "updates": 2, "episodes_per_update": 4, "environments": 2, "passes": 2,
    "minibatch_size": 6, "hidden_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _experiment(**changes: Any) -> Experiment:
    agent = {**TINY_AGENT, **changes.pop("agent", {})}
    env = {"id": TASK, "instances": "unknown-scale", **TINY_ENV, **changes.pop("env", {})}
    return Experiment({"env": env, "agent": agent, "train": {"workers": 2}, "seed": 3, **changes})


def _learner(experiment: Experiment) -> Learner:
    return Learner(experiment.task, experiment.env, experiment.agent, experiment.seed, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "whole", _experiment(), False, False)
    train(run, lambda seed, update, metrics: None)
    return run


def _checkpoint(run: RunFolder) -> Path:
    return run.seed_folder(0) / "checkpoints" / CHECKPOINT


def _lines(run: RunFolder) -> list[dict[str, float]]:
    text = (run.seed_folder(0) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# SB3's own API on the environment


def test_stock_ppo_trains_on_the_registered_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))
    env = gym.make(TASK, **TINY_ENV)
    model = PPO("MlpPolicy", env, n_steps=6, batch_size=6, n_epochs=1, device="cpu", seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(12)
    assert model.num_timesteps == 12
    assert not all(map(torch.equal, before, model.policy.parameters()))


# Whether it learns: a probe where the right action is known


class _Probe(gym.Env[np.ndarray, Any]):
    """The environment's spaces and info; right is up where the first entry is 1, down where -1.

    The reward is the share of layer groups that are right, times `weight`. An episode that draws
    `early` ends after its first step, as by divergence.
    """

    images_per_measurement = 10

    def __init__(self, weight: float = 1.0, early: float = 0.0) -> None:
        self.observation_space, self.action_space = spaces_of(TASK, PROBE_ENV)
        self._weight, self._early = weight, early

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        super().reset(seed=seed)
        self._step = 0
        self._diverges = self.np_random.random() < self._early
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        self._now = self.np_random.uniform(-1, 1, self.observation_space.shape)
        self._now[0] = self.np_random.choice((-1, 1))
        return self._now.astype(np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        share = float(np.mean(np.asarray(action) == (2 if self._now[0] > 0 else 0)))
        self._step += 1
        info = {
            "inner_step": 2 * self._step - self._diverges,  # a divergence cuts the window short
            "diverged": self._diverges,
            "accuracy/outer_valid": share,
        }
        terminated = self._step == 3 or self._diverges
        return self._observe(), self._weight * share, terminated, False, info


def _probe_learner(updates: int, seed: int = 0) -> Learner:
    settings = PPOSettings(updates=updates, environments=4, minibatch_size=48)
    return Learner(TASK, PROBE_ENV, settings, seed, 1)


def _probes(weight: float = 1.0, early: float = 0.0) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(_Probe(weight, early))] * 4)


def _share_right(learner: Learner) -> float:
    probe, right = _Probe(), []
    observation, _ = probe.reset(seed=99)
    for _ in range(300):
        action, _ = learner.policy.predict(observation, deterministic=True)
        right.append(np.mean(action == (2 if observation[0] > 0 else 0)))
        observation = probe._observe()
    return float(np.mean(right))


def test_ppo_solves_the_probe_and_fails_it_without_reward() -> None:
    learner = _probe_learner(updates=20)
    metrics = [values for _, values in learner.train_on(_probes(), 0)]
    assert _share_right(learner) > 0.95
    assert metrics[-1]["return"] > 2.4 > 1.3 > metrics[0]["return"]  # of 3, a third by chance
    assert metrics[-1]["entropy"] < metrics[0]["entropy"] <= np.log(3)

    control = _probe_learner(updates=20)
    list(control.train_on(_probes(weight=0.0), 0))
    assert _share_right(control) < 0.7


def test_metrics_count_episodes_that_end_early_and_what_the_update_cuts() -> None:
    learner = _probe_learner(updates=2)
    model = learner._model
    metrics = [values for _, values in learner.train_on(_probes(early=0.5), 0)]
    starts = model.rollout_buffer.episode_starts.astype(bool)  # (T, E) of the last update
    finished = int(starts[1:].sum() + model._last_episode_starts.sum())
    second = metrics[1]["episodes"] - metrics[0]["episodes"]
    assert second == finished > 32
    diverged = round(metrics[1]["diverged"] * second)
    assert 0 < diverged < second
    # 96 env steps of 2 inner steps each, a divergence costing one; 10 images a measurement.
    assert metrics[1]["inner_steps"] == 2 * 96 - diverged
    assert metrics[1]["validation_images"] == 10 * (4 + 96 - diverged + finished)


def test_the_global_generators_are_left_as_found() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    learner = _probe_learner(updates=1)
    list(learner.train_on(_probes(), 0))
    learner.policy.predict(np.zeros(9, np.float32))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_training_follows_its_seed_alone() -> None:
    results = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        learner = _probe_learner(updates=2, seed=seed)
        results.append([values for _, values in learner.train_on(_probes(), 0)])
    assert results[0] == results[1] != results[2]


# Runs


def test_a_run_trains_saves_and_loads_in_sb3(finished: RunFolder) -> None:
    lines = _lines(finished)
    assert [line["update"] for line in lines] == [0, 1]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    # 12 env steps of 2 inner steps; 50 images at 2 + 4 resets and 12 steps.
    if not any(line["diverged"] for line in lines):
        assert [line["episodes"] for line in lines] == [4, 8]
        assert [line["inner_steps"] for line in lines] == [24, 24]
        assert [line["validation_images"] for line in lines] == [900, 900]
    path = _checkpoint(finished)
    assert [p.name for p in path.parent.iterdir()] == [CHECKPOINT]

    theirs = PPO.load(path, device="cpu")
    ours = load_policies(finished)[0]
    generator = np.random.default_rng(0)
    for _ in range(20):
        observation = generator.uniform(-1, 1, 9).astype(np.float32)
        expected, _ = theirs.predict(observation, deterministic=True)
        assert np.array_equal(expected, ours.predict(observation, deterministic=True)[0])


def test_a_resumed_run_is_the_uninterrupted_one(finished: RunFolder, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(seed: int, update: int, metrics: dict[str, float]) -> None:
        raise Killed

    run = RunFolder.create(tmp_path / "run", _experiment(), False, False)
    with pytest.raises(Killed):
        train(run, kill)
    assert len(_lines(run)) == 1
    again = RunFolder.create(tmp_path / "run", _experiment(train={"workers": 1}), True, False)
    train(again, lambda seed, update, metrics: None)
    for line, expected in zip(_lines(again), _lines(finished), strict=True):
        del line["seconds"], expected["seconds"]
        assert line == expected
    one, other = _learner(_experiment()), _learner(_experiment())
    assert one.load(_checkpoint(again)) == other.load(_checkpoint(finished)) == 2
    assert _same(one._model.get_parameters(), other._model.get_parameters())


def test_box_actions_train() -> None:
    experiment = _experiment(env={"action": "box"}, agent={"updates": 1})
    learner = _learner(experiment)
    ((update, metrics),) = learner.train(0)
    assert update == 0
    assert np.isfinite(metrics["entropy"])
    action, _ = learner.policy.predict(np.zeros(9, np.float32))
    assert spaces_of(TASK, experiment.env)[1].contains(action)


def test_the_shipped_experiment_trains_as_many_episodes_as_reinforce() -> None:
    ppo = load_experiment("digits-ppo")
    assert ppo.agent == PPOSettings()
    assert ppo.agent.episodes == load_experiment("digits-reinforce").agent.episodes
    rollout = ppo.agent.episodes_per_update * len(ppo.env.windows())
    assert rollout % ppo.agent.minibatch_size == 0


# The policy


def test_sampled_actions_follow_the_seed_and_survive_pickling() -> None:
    policy = _learner(_experiment()).policy
    observation = np.zeros(9, np.float32)

    def draw(chosen: Any, count: int = 20) -> list[list[int]]:
        return [chosen.predict(observation)[0].tolist() for _ in range(count)]

    policy.seed(4)
    first = draw(policy)
    torch.manual_seed(1)
    policy.seed(4)
    assert draw(policy, 10) == first[:10]
    assert draw(copy.deepcopy(policy), 10) == first[10:]
    policy.seed(5)
    assert draw(policy) != first
    assert len({tuple(action) for action in first}) > 1


def test_a_policy_acts_in_workers_as_in_the_main_process(finished: RunFolder) -> None:
    experiment = finished.experiment
    policy = load_policy(_checkpoint(finished), experiment)
    instance = published_test_instances(TASK, "unknown-scale")[0]
    with RolloutPool(TASK, experiment.env, 1) as pool:
        episodes: list[Episode] = list(
            pool.map(run_policy, [(policy, instance, seed, False) for seed in (7, 7, 8)])
        )
    policy.seed(7)
    expected = [policy.predict(row)[0] for row in episodes[0].observations]
    assert np.array_equal(episodes[0].actions, expected)
    assert np.array_equal(episodes[0].actions, episodes[1].actions)
    assert not np.array_equal(episodes[0].actions, episodes[2].actions)


# Mistakes


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named_in_one_sentence(
    finished: RunFolder, tmp_path: Path, kept: float
) -> None:
    whole = _checkpoint(finished).read_bytes()
    path = tmp_path / CHECKPOINT
    path.write_bytes(whole[: int(len(whole) * kept)])
    expected = r"last\.zip is no whole checkpoint of this agent \(.+\); restore it from a copy or "
    with pytest.raises(ConfigError, match=expected):
        _learner(finished.experiment).load(path)
    with pytest.raises(ConfigError, match=expected):
        load_policy(path, finished.experiment)


def test_damaged_bytes_inside_a_checkpoint_are_found(finished: RunFolder, tmp_path: Path) -> None:
    damaged = bytearray(_checkpoint(finished).read_bytes())
    middle = damaged.index(b"policy.optimizer.pth") - 400
    damaged[middle : middle + 40] = bytes(40)
    path = tmp_path / CHECKPOINT
    path.write_bytes(bytes(damaged))
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        load_policy(path, finished.experiment)


def test_a_checkpoint_of_another_size_is_refused(finished: RunFolder) -> None:
    other = _experiment(agent={"hidden_size": 9})
    with pytest.raises(ConfigError, match="no whole checkpoint of this agent"):
        load_policy(_checkpoint(finished), other)
    with pytest.raises(ConfigError, match="no whole checkpoint of this agent"):
        _learner(other).load(_checkpoint(finished))


def test_a_zip_of_sb3_alone_is_refused(tmp_path: Path) -> None:
    learner = _learner(_experiment())
    learner._model.save(tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match="no item named 'asg-env.json'"):
        learner.load(tmp_path / CHECKPOINT)


def test_episodes_that_do_not_fill_the_environments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a multiple of environments \(8\), got 12"):
        validate(PPOSettings, {"kind": "ppo", "episodes_per_update": 12}, "agent")


def test_missing_sb3_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ConfigError, match=r"agent ppo needs .*; pip install 'asg-env\[sb3\]'"):
        importlib.import_module("agents.sb3")
