"""SB3's algorithms on a probe environment: learning, seeds, resuming, normalising, policies."""

import copy
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import ARS, TQC, TRPO, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import experiment
from agents.sb3 import learner as sb3
from agents.sb3.algorithms import spaces_of
from agents.sb3.learner import CHECKPOINT, Learner, load_normaliser, load_policy
from agents.sb3.settings import SB3Settings
from asg_env.config import EnvSettings
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"
RELATIVE = EnvSettings(horizon=3, observation="scaled")
BOX = EnvSettings(horizon=3, observation="scaled", action="box")
STEP = 3  # env steps of an episode

CLASSES = {
    "ppo": PPO, "a2c": A2C, "recurrent-ppo": RecurrentPPO, "trpo": TRPO,
    "sac": SAC, "td3": TD3, "tqc": TQC, "crossq": CrossQ, "ars": ARS,
}  # fmt: skip
_OFF = {
    "environments": 4, "hidden_size": 16, "minibatch_size": 32, "learning_starts": 48,
    "policy_lr": 1e-2, "discount": 0.0, "updates": 3,
}  # fmt: skip
# What solves the probe in a second or two.
SOLVES: dict[str, dict[str, Any]] = {
    "ppo": {"updates": 6, "environments": 4, "minibatch_size": 48, "policy_lr": 5e-3},
    "a2c": {"updates": 10, "environments": 4, "rollout_steps": 3, "policy_lr": 3e-3},
    "recurrent-ppo": {
        "updates": 6, "environments": 4, "minibatch_size": 48, "lstm_size": 16, "hidden_size": 16,
        "policy_lr": 1e-2,
    },
    "trpo": {
        "updates": 7, "environments": 4, "max_kl": 0.15, "minibatch_size": 96, "critic_passes": 2,
    },
    "sac": _OFF,
    "td3": {  # a slow actor, or tanh saturates before the critic knows anything
        **_OFF, "updates": 4, "hidden_size": 32, "minibatch_size": 64, "learning_starts": 144,
        "action_noise": 0.5, "policy_delay": 16, "gradient_steps": 8, "polyak": 0.05,
    },
    "tqc": {**_OFF, "updates": 4, "gradient_steps": 2},
    "crossq": {**_OFF, "policy_lr": 2e-2, "policy_delay": 1, "gradient_steps": 3},
    "ars": {"updates": 12, "policy_lr": 0.3},
}  # fmt: skip
_SMALL = {"updates": 2, "episodes_per_update": 4, "environments": 2, "hidden_size": 8}
_SMALL_OFF = {**_SMALL, "minibatch_size": 4, "learning_starts": 4}
SMALL: dict[str, dict[str, Any]] = {
    "ppo": {**_SMALL, "minibatch_size": 6},
    "a2c": {**_SMALL, "rollout_steps": 2},
    "recurrent-ppo": {**_SMALL, "minibatch_size": 6, "lstm_size": 8},
    "trpo": {**_SMALL, "minibatch_size": 6},
    "sac": _SMALL_OFF,
    "td3": {**_SMALL_OFF, "train_freq": 3, "gradient_steps": 1},
    "tqc": _SMALL_OFF,
    "crossq": {**_SMALL_OFF, "buffer_size": 10},  # it overflows
    "ars": {"updates": 2, "episodes_per_update": 8},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class _Probe(gym.Env[np.ndarray, Any]):
    """The environment's spaces and info; right is up where the first entry is 1, down where -1.

    The reward is the share of layer groups that are right, or how right they are, times `weight`.
    An episode that draws `early` ends after its first step, as by divergence.
    """

    images_per_measurement = 10

    def __init__(self, env: EnvSettings, weight: float = 1.0, early: float = 0.0) -> None:
        self.observation_space, self.action_space = spaces_of(TASK, env)
        self._box = env.action == "box"
        self._weight, self._early = weight, early

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, Any]:
        super().reset(seed=seed)
        self._step = 0
        self._diverges = self.np_random.random() < self._early
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        self._now = self.np_random.uniform(-1, 1, self.observation_space.shape)
        self._now[0] = self.np_random.choice((-1, 1))
        return self._now.astype(np.float32)

    def share_right(self, action: Any) -> float:
        """From 0 to 1; by chance a third with relative actions, a half with real numbers."""
        if self._box:
            return float(np.mean(np.asarray(action) * self._now[0] + 1) / 2)
        return float(np.mean(np.asarray(action) == (2 if self._now[0] > 0 else 0)))

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        share = self.share_right(action)
        self._step += 1
        info = {
            "inner_step": 2 * self._step - self._diverges,  # a divergence cuts the window short
            "diverged": self._diverges,
            "accuracy/outer_valid": share,
        }
        terminated = self._step == STEP or self._diverges
        return self.observe(), self._weight * share, terminated, False, info


def _settings(kind: str, **values: Any) -> SB3Settings:
    module, name = experiment.AGENTS[kind]
    assert module == "agents.sb3.learner"
    return validate(getattr(sb3, name), values, "agent")


def _env(kind: str) -> EnvSettings:
    return BOX if type(_settings(kind)).box_only else RELATIVE


def _learner(kind: str, seed: int = 0, **values: Any) -> Learner:
    return Learner(TASK, _env(kind), _settings(kind, **values), seed, 0)


def _probes(learner: Learner, weight: float = 1.0, early: float = 0.0) -> DummyVecEnv:
    make = [lambda: Monitor(_Probe(learner._env, weight, early))]
    return DummyVecEnv(make * learner._settings.environments)


def _trained(learner: Learner, start: int = 0, weight: float = 1.0, early: float = 0.0) -> Any:
    return [values for _, values in learner.train_on(_probes(learner, weight, early), start)]


def _share_right(learner: Learner) -> float:
    probe, right, state = _Probe(learner._env), [], None
    policy = learner.policy
    observation, _ = probe.reset(seed=99)
    for step in range(300):
        first = np.array([step % STEP == 0])
        action, state = policy.predict(observation, state, first, deterministic=True)
        right.append(probe.share_right(action))
        observation = probe.observe()
    return float(np.mean(right))


def _stub(kind: str, settings: SB3Settings) -> Any:
    """What `load_policy` reads of an experiment."""

    class Stub:
        task, env, agent = TASK, _env(kind), settings

    return Stub


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists, arrays and tensors are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other or (one != one and other != other))  # nan


# Learning


@pytest.mark.parametrize("kind", CLASSES)
def test_every_algorithm_solves_the_probe_and_fails_it_without_reward(kind: str) -> None:
    learner = _learner(kind, **SOLVES[kind])
    metrics = _trained(learner)
    chance = 1 / 2 if learner._settings.box_only else 1 / 3
    assert _share_right(learner) > 0.75
    assert metrics[-1]["return"] > metrics[0]["return"] + 0.5
    assert metrics[-1]["accuracy"] > chance + 0.15
    drawn = kind not in ("td3", "ars")  # the others have an entropy, and it falls
    assert metrics[-1]["entropy"] < metrics[0]["entropy"] if drawn else metrics[-1]["entropy"] == 0

    control = _learner(kind, **SOLVES[kind])
    _trained(control, weight=0.0)
    assert _share_right(control) < 0.7


def test_entropy_is_in_nats_per_group() -> None:
    for kind in ("ppo", "a2c", "recurrent-ppo", "trpo"):
        (first, *_) = _trained(_learner(kind, **{**SMALL[kind], "updates": 1}))
        assert 0.9 * np.log(3) < first["entropy"] <= np.log(3)
    for kind in ("sac", "tqc", "crossq"):  # of a density on (-1, 1), at most that of a uniform one
        (first, *_) = _trained(_learner(kind, **{**SMALL[kind], "updates": 1}))
        assert 0 < first["entropy"] < np.log(2) + 0.2  # an estimate from a few samples


def test_metrics_count_episodes_that_end_early_and_what_the_update_cuts() -> None:
    learner = _learner("ppo", updates=2, environments=4, minibatch_size=48)
    model = learner._model
    metrics = _trained(learner, early=0.5)
    starts = model.rollout_buffer.episode_starts.astype(bool)  # (T, E) of the last update
    finished = int(starts[1:].sum() + model._last_episode_starts.sum())
    second = metrics[1]["episodes"] - metrics[0]["episodes"]
    assert second == finished > 32
    diverged = round(metrics[1]["diverged"] * second)
    assert 0 < diverged < second
    # 96 env steps of 2 inner steps each, a divergence costing one; 10 images a measurement.
    assert metrics[1]["inner_steps"] == 2 * 96 - diverged
    assert metrics[1]["validation_images"] == 10 * (4 + 96 - diverged + finished)
    assert metrics[1]["time/total_timesteps"] == 2 * 96


@pytest.mark.parametrize("kind", CLASSES)
def test_an_update_takes_its_episodes_of_env_steps(kind: str) -> None:
    learner = _learner(kind, **SMALL[kind])
    metrics = _trained(learner)
    episodes = learner._settings.episodes_per_update
    assert [values["episodes"] for values in metrics] == [episodes, 2 * episodes]
    assert [values["inner_steps"] for values in metrics] == [2 * STEP * episodes] * 2
    assert metrics[1]["time/total_timesteps"] == learner._model.num_timesteps
    assert learner._model.num_timesteps == 2 * STEP * episodes == STEP * learner._settings.episodes
    names = {"episodes", "return", "accuracy", "diverged", "entropy"}
    assert names | {"inner_steps", "validation_images"} <= set(metrics[0])
    assert any(name.startswith("train/") for name in metrics[1])


def test_candidates_of_ars_are_judged_on_the_same_problems() -> None:
    seen: list[list[int]] = []

    class Recorded(_Probe):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            found = super().reset(seed=seed)
            if seed is not None:
                seen.append([seed, *(1000 * self._now).astype(int)])
            return found

    learner = _learner("ars", updates=1, episodes_per_update=16)
    envs = DummyVecEnv([lambda: Monitor(Recorded(BOX))] * 2)
    list(learner.train_on(envs, 0))
    # Two environments, four directions forwards and backwards; SB3's `learn` starts with a reset.
    assert len(seen) == 2 * (1 + 2 * 4)
    assert len({tuple(row) for row in seen}) == 2


# Seeds and resuming


@pytest.mark.parametrize("kind", ["ppo", "sac", "ars"])
def test_the_global_generators_are_left_as_found(kind: str) -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    learner = _learner(kind, **SMALL[kind])
    _trained(learner)
    learner.policy.predict(np.zeros(9, np.float32))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("kind", CLASSES)
def test_training_follows_its_seed_alone(kind: str) -> None:
    results = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        results.append(_trained(_learner(kind, seed=seed, **SMALL[kind])))
    assert _same(results[0], results[1])
    assert not _same(results[0], results[2])


@pytest.mark.parametrize("kind", CLASSES)
def test_a_resumed_training_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    values = {**SMALL[kind], "normalise_observations": True}
    if kind != "ars":
        values["normalise_rewards"] = True
    whole = _learner(kind, **values)
    lines = []
    for update, metrics in whole.train_on(_probes(whole, early=0.3), 0):
        lines.append(metrics)
        whole.save(tmp_path / f"{update}.zip", update)
    again = _learner(kind, seed=0, **values)
    assert again.load(tmp_path / "0.zip") == 1
    assert _same(_trained(again, start=1, early=0.3), lines[1:])
    again.save(tmp_path / "again.zip", 1)
    assert _same(_contents(again), _contents(whole))
    reread = _learner(kind, seed=0, **values)
    assert reread.load(tmp_path / "1.zip") == 2
    assert _same(_contents(reread), _contents(whole))
    for name in ("asg-env.json", "asg-env-normaliser.npz", "policy.pth"):
        with (
            zipfile.ZipFile(tmp_path / "1.zip") as one,
            zipfile.ZipFile(tmp_path / "again.zip") as other,
        ):
            assert one.read(name) == other.read(name)


def _contents(learner: Learner) -> list[Any]:
    """Everything that a later update depends on."""
    model = learner._model
    found = [model.get_parameters(), model.num_timesteps, model._n_updates, learner._episodes]
    found += [getattr(model, name).detach() for name in model._get_torch_save_params()[1]]
    found.append(sb3.statistics_of(learner._normaliser))
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        assert buffer.size() > 0
        arrays = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
        found += [getattr(buffer, name)[: buffer.size()] for name in arrays]
        found += [buffer.pos, buffer.full]
    if hasattr(model, "weights"):
        found.append(model.weights)
    return found


# Checkpoints in SB3, normalising


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_checkpoint_acts_in_sb3_as_in_our_policy(
    kind: str, normalised: bool, tmp_path: Path
) -> None:
    learner = _learner(kind, **{**SMALL[kind], "normalise_observations": normalised})
    _trained(learner)
    path = tmp_path / CHECKPOINT
    learner.save(path, 1)
    theirs = CLASSES[kind].load(path, device="cpu")
    ours = load_policy(path, _stub(kind, learner._settings))
    envs = _probes(learner)
    if normalised:
        envs = load_normaliser(path, envs)
        assert not envs.training
        assert envs.obs_rms.count > 12
    envs.seed(7)
    observations = envs.reset()
    state, our_states, first = None, [None] * envs.num_envs, np.ones(envs.num_envs, bool)
    for _ in range(5):
        raw = envs.get_original_obs() if normalised else observations
        expected, state = theirs.predict(observations, state, first, deterministic=True)
        actions = []
        for row in range(envs.num_envs):
            action, our_states[row] = ours.predict(
                raw[row], our_states[row], first[row : row + 1], deterministic=True
            )
            actions.append(action)
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)  # batches of 2 and 1
        observations, _, first, _ = envs.step(expected)


def test_normalised_observations_change_what_is_learned_and_rewards_too() -> None:
    plain, observations, rewards = (
        _trained(_learner("ppo", **SMALL["ppo"], **{name: True}))[1]["train/value_loss"]
        if name
        else _trained(_learner("ppo", **SMALL["ppo"]))[1]["train/value_loss"]
        for name in ("", "normalise_observations", "normalise_rewards")
    )
    assert len({plain, observations, rewards}) == 3


def test_returns_are_reported_before_normalising() -> None:
    values = {**SMALL["ppo"], "normalise_observations": True, "normalise_rewards": True}
    for line in _trained(_learner("ppo", **values)):
        assert 0 < line["accuracy"] <= 1
        assert 0 < line["return"] <= STEP


def test_a_checkpoint_without_statistics_is_refused_in_one_sentence(tmp_path: Path) -> None:
    learner = _learner("ppo", **SMALL["ppo"])
    learner.save(tmp_path / CHECKPOINT, 0)
    with pytest.raises(ConfigError, match="has no statistics to load: its training normalised"):
        load_normaliser(tmp_path / CHECKPOINT, _probes(learner))


def test_a_replay_buffer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    learner = _learner("sac", **SMALL["sac"])
    _trained(learner)
    learner.save(tmp_path / CHECKPOINT, 1)
    smaller = _learner("sac", **SMALL["sac"], buffer_size=10)
    with pytest.raises(ConfigError, match=r"no whole checkpoint of this agent \(its replay buffer"):
        smaller.load(tmp_path / CHECKPOINT)
    with zipfile.ZipFile(tmp_path / "without.zip", "w") as archive:
        with zipfile.ZipFile(tmp_path / CHECKPOINT) as whole:
            for name in whole.namelist():
                if "buffer" not in name:
                    archive.writestr(name, whole.read(name))
    with pytest.raises(ConfigError, match=r"no whole checkpoint of this agent \(.*buffer"):
        _learner("sac", **SMALL["sac"]).load(tmp_path / "without.zip")


# Policies


@pytest.mark.parametrize("kind", ["ppo", "recurrent-ppo", "sac"])
def test_sampled_actions_follow_the_seed_and_survive_pickling(kind: str) -> None:
    policy = _learner(kind, **{**SMALL[kind], "normalise_observations": True}).policy
    observation = np.zeros(9, np.float32)

    def draw(chosen: Any, count: int = 20) -> list[list[float]]:
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


@pytest.mark.parametrize("kind", ["td3", "ars"])
def test_a_policy_without_entropy_always_acts_greedily(kind: str) -> None:
    policy = _learner(kind, **SMALL[kind]).policy
    observation = np.linspace(-1, 1, 9, dtype=np.float32)
    greedy, _ = policy.predict(observation, deterministic=True)
    assert np.array_equal(policy.predict(observation)[0], greedy)
    assert spaces_of(TASK, BOX)[1].contains(greedy)


def test_the_recurrent_state_is_carried_and_put_to_zero_at_an_episodes_start() -> None:
    policy = _learner("recurrent-ppo", **SMALL["recurrent-ppo"]).policy
    observation = np.linspace(-1, 1, 9, dtype=np.float32)
    first, later = np.array([True]), np.array([False])
    _, fresh = policy.predict(observation, None, first, deterministic=True)
    assert [part.shape for part in fresh] == [(1, 1, 8), (1, 1, 8)]
    _, carried = policy.predict(observation, fresh, later, deterministic=True)
    _, again = policy.predict(observation, carried, first, deterministic=True)
    assert not np.array_equal(fresh[0], carried[0])
    assert np.array_equal(fresh[0], again[0])
    assert np.array_equal(fresh[1], again[1])
    assert _learner("ppo", **SMALL["ppo"]).policy.predict(observation, None, first)[1] is None


# Evaluations and kept models


def test_evaluations_and_kept_models_are_written_and_change_nothing(tmp_path: Path) -> None:
    values = {**SMALL["recurrent-ppo"], "updates": 3, "normalise_observations": True}
    plain = _trained(_learner("recurrent-ppo", **values))
    values |= {"evaluate_every": 1, "keep_every": 2}

    whole = _learner("recurrent-ppo", **values)
    whole.folder = tmp_path / "whole"
    lines = []
    for update, metrics in whole.train_on(_probes(whole), 0):
        lines.append(metrics)
        whole.save(tmp_path / f"{update}.zip", update)
    trained = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]
    assert _same(trained, plain)
    assert all(line["eval/mean_ep_length"] == STEP for line in lines)
    names = ["best_model.zip", "evaluations.npz", "rl_model_24_steps.zip"]
    assert sorted(path.name for path in whole.folder.iterdir()) == names
    with np.load(whole.folder / "evaluations.npz", allow_pickle=False) as found:
        assert found["timesteps"].tolist() == [12, 24, 36]
        assert found["results"].shape == found["ep_lengths"].shape == (3, 8)
        means = [line["eval/mean_reward"] for line in lines]
        np.testing.assert_allclose(found["results"].mean(axis=1), means)
    best = json.loads(zipfile.ZipFile(whole.folder / "best_model.zip").read("asg-env.json"))
    assert best["updates"] == 1 + int(np.argmax(means))
    for name in ("best_model.zip", "rl_model_24_steps.zip"):
        assert RecurrentPPO.load(whole.folder / name, device="cpu").num_timesteps > 0
        load_normaliser(whole.folder / name, _probes(whole))
        load_policy(whole.folder / name, _stub("recurrent-ppo", whole._settings))

    again = _learner("recurrent-ppo", **values)
    again.folder = tmp_path / "again"
    again.folder.mkdir()
    assert again.load(tmp_path / "0.zip") == 1
    assert _same(_trained(again, start=1), lines[1:])
    with (
        np.load(whole.folder / "evaluations.npz", allow_pickle=False) as one,
        np.load(again.folder / "evaluations.npz", allow_pickle=False) as other,
    ):
        assert _same(dict(one), dict(other))


def test_a_model_that_is_not_completed_is_not_left_half(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    learner = _learner("ppo", **{**SMALL["ppo"], "evaluate_every": 1})
    learner.folder = tmp_path
    monkeypatch.setattr("agents.sb3.callbacks.add_entries", full)
    with pytest.raises(OSError, match="No space left"):
        _trained(learner)
    assert "best_model.zip" not in {path.name for path in tmp_path.rglob("*")}


def test_evaluations_need_a_folder() -> None:
    learner = _learner("ppo", **SMALL["ppo"], evaluate_every=1)
    with pytest.raises(ValueError, match="`folder` must be set for evaluate_every and keep_every"):
        _trained(learner)
