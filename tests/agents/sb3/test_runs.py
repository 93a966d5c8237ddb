"""Runs of SB3's agents on the environment: folders, processes, checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

import asg_env  # noqa: F401 - registers the environments
from agents.experiment import Experiment
from agents.rollout import Episode, RolloutPool, run_policy
from agents.run_folder import RunFolder
from agents.sb3.learner import CHECKPOINT, Learner, load_policy, spaces_of
from agents.train import load_policies, train
from asg_env.env import LayerwiseLREnv
from asg_env.instances import TRAIN_SEEDS, published_test_instances
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
TINY_ENV = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50, "observation": "scaled"}
TINY: dict[str, dict[str, Any]] = {
    "ppo": {
        "kind": "ppo", "updates": 2, "episodes_per_update": 4, "environments": 2, "passes": 2,
        "minibatch_size": 6, "hidden_size": 8,
    },
    "sac": {
        "kind": "sac", "updates": 2, "episodes_per_update": 4, "environments": 2,
        "minibatch_size": 6, "hidden_size": 8, "learning_starts": 6,
    },
    "ars": {"kind": "ars", "updates": 2, "episodes_per_update": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _experiment(kind: str = "ppo", **changes: Any) -> Experiment:
    agent = {**TINY[kind], **changes.pop("agent", {})}
    env = {"id": TASK, "instances": "unknown-scale", **TINY_ENV, **changes.pop("env", {})}
    return Experiment({"env": env, "agent": agent, "train": {"workers": 2}, "seed": 3, **changes})


def _learner(experiment: Experiment, workers: int = 2) -> Learner:
    return Learner(experiment.task, experiment.env, experiment.agent, experiment.seed, workers)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    experiment = _experiment(agent={"evaluate_every": 2, "keep_every": 1})
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "whole", experiment, False, False)
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
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


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
    beside = {p.name for p in finished.seed_folder(0).iterdir()}
    assert {"evaluations.npz", "best_model.zip", "rl_model_12_steps.zip"} <= beside
    assert "eval/mean_reward" not in lines[0]
    assert "eval/mean_reward" in lines[1]
    assert {"train/approx_kl", "train/explained_variance", "rollout/ep_rew_mean"} <= set(lines[0])

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

    experiment = _experiment(agent={"evaluate_every": 2, "keep_every": 1})
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    with pytest.raises(Killed):
        train(run, kill)
    assert len(_lines(run)) == 1
    other = _experiment(agent={"evaluate_every": 2, "keep_every": 1}, train={"workers": 1})
    again = RunFolder.create(tmp_path / "run", other, True, False)
    train(again, lambda seed, update, metrics: None)
    for line, expected in zip(_lines(again), _lines(finished), strict=True):
        del line["seconds"], expected["seconds"]
        assert line == expected
    one, two = _learner(other), _learner(other)
    assert one.load(_checkpoint(again)) == two.load(_checkpoint(finished)) == 2
    assert _same(one._model.get_parameters(), two._model.get_parameters())


@pytest.mark.parametrize("kind", ["ppo", "ars"])  # ARS steps its environments without gradients
def test_environments_in_this_process_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    agent = {"normalise_observations": True}
    if kind == "ppo":
        agent["normalise_rewards"] = True
    experiment = _experiment(kind, agent=agent, env={"action": "box"})
    here, apart = _learner(experiment, 0), _learner(experiment, 2)
    assert list(here.train(0)) == list(apart.train(0))
    assert _same(here._model.get_parameters(), apart._model.get_parameters())
    for learner, name in ((here, "here"), (apart, "apart")):
        learner.save(tmp_path / f"{name}.zip", 1)
    one, two = load_policy(tmp_path / "here.zip", experiment), apart.policy
    observation = np.linspace(-1, 1, 9, dtype=np.float32)
    action, _ = one.predict(observation)
    assert np.array_equal(action, two.predict(observation)[0])
    assert spaces_of(TASK, experiment.env)[1].contains(action)


def test_training_and_evaluation_see_train_instances_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seeds: list[int] = []
    reset = LayerwiseLREnv.reset

    def recorded(self: LayerwiseLREnv, **arguments: Any) -> Any:
        found = reset(self, **arguments)
        assert self.instance is not None
        seeds.extend((self.instance.head_seed, self.instance.data_seed))
        return found

    monkeypatch.setattr(LayerwiseLREnv, "reset", recorded)
    learner = _learner(_experiment(agent={"updates": 1, "evaluate_every": 1}), 0)
    learner.folder = tmp_path
    list(learner.train(0))
    # Two environments: their resets, 4 episodes, resets again, 8 evaluated episodes.
    assert len(seeds) >= 2 * (2 + 4 + 2 + 8)
    assert all(TRAIN_SEEDS[0] <= seed < TRAIN_SEEDS[1] for seed in seeds)


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


def test_the_code_of_the_docs_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = {"kind": "tqc", "normalise_observations": True}
    env = {"id": TASK, "instances": "unknown-scale", "action": "box"}
    learner = _learner(Experiment({"env": env, "agent": agent}))
    path = tmp_path / "runs/tqc/seed-0/checkpoints" / CHECKPOINT
    path.parent.mkdir(parents=True)
    learner.save(path, 0)
    text = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n(.*?load_normaliser.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    observation = found["envs"].get_original_obs()[0]
    ours, _ = learner.policy.predict(observation, deterministic=True)
    np.testing.assert_allclose(found["action"][0], ours, rtol=1e-5)


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


def test_a_checkpoint_of_another_size_or_algorithm_is_refused(finished: RunFolder) -> None:
    others = (_experiment(agent={"hidden_size": 9}), _experiment("sac", env={"action": "box"}))
    for other in others:
        with pytest.raises(ConfigError, match="no whole checkpoint of this agent"):
            load_policy(_checkpoint(finished), other)
        with pytest.raises(ConfigError, match="no whole checkpoint of this agent"):
            _learner(other).load(_checkpoint(finished))


def test_a_zip_of_sb3_alone_is_refused(tmp_path: Path) -> None:
    learner = _learner(_experiment())
    learner._model.save(tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match=r"no item named 'asg-env\.json'"):
        learner.load(tmp_path / CHECKPOINT)
