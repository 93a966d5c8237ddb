"""The algorithms of stable-baselines3 and sb3-contrib by name, and what is built from settings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import ARS, TQC, TRPO, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from agents.sb3.box_settings import TD3Settings
from agents.sb3.settings import SB3Settings
from asg_env.actions import ACTIONS
from asg_env.build import task_of
from asg_env.config import EnvSettings
from asg_env.observations import Observation

# `agent.kind` -> SB3's class and its name for the network.
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], str]] = {
    "ppo": (PPO, "MlpPolicy"),
    "a2c": (A2C, "MlpPolicy"),
    "recurrent-ppo": (RecurrentPPO, "MlpLstmPolicy"),
    "trpo": (TRPO, "MlpPolicy"),
    "sac": (SAC, "MlpPolicy"),
    "td3": (TD3, "MlpPolicy"),
    "tqc": (TQC, "MlpPolicy"),
    "crossq": (CrossQ, "MlpPolicy"),
    "ars": (ARS, "MlpPolicy"),
}

Spaces = Sequence[spaces.Space[Any]]  # of observations and of actions
Statistics = dict[str, np.ndarray]  # {obs,ret}_{mean,var,count} of a VecNormalize


class SpacesAlone(gym.Env[np.ndarray, Any]):
    """An environment without steps: models are built and loaded on it before any process runs."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def spaces_of(task: str, env: EnvSettings) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Observation and action space of an environment, without building one."""
    groups = tuple(task_of(task, env).layer_groups)
    return (
        Observation(env.observation, groups, env.grid, env.further_terms()).space,
        ACTIONS[env.action](env.grid, len(groups)).space,
    )


def build_model(settings: SB3Settings, both: Spaces, steps: int) -> BaseAlgorithm:
    """Build the SB3 algorithm; it draws its first weights from the global generator.

    Args:
        settings: Of the agent.
        both: Observation and action space.
        steps: Env steps of each environment in one update.
    """
    algorithm, policy = ALGORITHMS[settings.kind]
    arguments = settings.arguments(steps)
    if isinstance(settings, TD3Settings):
        zeros = np.zeros(both[1].shape or ())
        arguments["action_noise"] = NormalActionNoise(zeros, zeros + settings.action_noise)
    return algorithm(
        policy=policy,
        env=DummyVecEnv([partial(SpacesAlone, *both)] * settings.environments),
        policy_kwargs=settings.policy_arguments(),
        device="cpu",
        **arguments,
    )


def build_network(settings: SB3Settings, both: Spaces) -> BasePolicy:
    """Build the network of `build_model` alone, with weights that are to be replaced."""
    algorithm, policy = ALGORITHMS[settings.kind]
    schedule = () if algorithm is ARS else (lambda _: 0.0,)  # ARS's has no optimizer
    with torch.random.fork_rng(devices=[]):
        return algorithm.policy_aliases[policy](*both, *schedule, **settings.policy_arguments())


def build_normaliser(settings: SB3Settings, both: Spaces) -> VecNormalize | None:
    """Build the VecNormalize that the settings ask for, around spaces alone."""
    arguments = settings.normaliser_arguments()
    if arguments is None:
        return None
    return VecNormalize(DummyVecEnv([partial(SpacesAlone, *both)]), **arguments)


def statistics_of(normaliser: VecNormalize | None) -> Statistics:
    """Running means and variances, in full precision; nothing where nothing is normalised."""
    if normaliser is None:
        return {}
    return {
        f"{name}_{part}": np.array(getattr(getattr(normaliser, f"{name}_rms"), part), np.float64)
        for name in _running(normaliser)
        for part in ("mean", "var", "count")
    }


def _running(normaliser: VecNormalize) -> tuple[str, ...]:
    """Return what a VecNormalize keeps running: returns always, observations if asked to."""
    return ("ret", "obs") if normaliser.norm_obs else ("ret",)


def set_statistics(normaliser: VecNormalize, statistics: Statistics) -> None:
    """Put what `statistics_of` returned into a VecNormalize.

    Raises:
        KeyError: One is missing.
        ValueError: One has another shape than the observations.
    """
    for name in _running(normaliser):
        rms = getattr(normaliser, f"{name}_rms")
        for part in ("mean", "var"):
            value = statistics[f"{name}_{part}"]
            if value.shape != getattr(rms, part).shape:
                raise ValueError(f"{name}_{part} has shape {value.shape}")
            setattr(rms, part, value)
        rms.count = float(statistics[f"{name}_count"])


def frozen_normaliser(statistics: Statistics, envs: VecEnv) -> VecNormalize:
    """Wrap environments in a VecNormalize that learns no more and leaves rewards as they are."""
    wrapped = VecNormalize(
        envs, training=False, norm_obs="obs_mean" in statistics, norm_reward=False
    )
    set_statistics(wrapped, statistics)
    return wrapped


def entropy_of(model: Any, groups: int) -> float:
    """Entropy of the policy in nats per layer group, after an update; 0 where it draws nothing.

    PPO, RecurrentPPO and A2C report the mean over the update's last training. For TRPO it is the
    mean over the update's observations; for SAC, TQC and CrossQ an estimate from one minibatch.
    """
    values = model.logger.name_to_value
    if "train/entropy_loss" in values:
        return -float(values["train/entropy_loss"]) / groups
    with torch.no_grad():
        if isinstance(model, TRPO):
            observations = obs_as_tensor(model.rollout_buffer.observations, model.device)
            assert isinstance(observations, torch.Tensor)
            entropy = model.policy.get_distribution(observations).entropy()
            assert entropy is not None
            return float(entropy.mean()) / groups
        if isinstance(model, SAC | TQC | CrossQ):
            model.policy.set_training_mode(False)
            assert model.replay_buffer is not None
            samples = model.replay_buffer.sample(
                model.batch_size, env=model.get_vec_normalize_env()
            )
            _, log_density = model.actor.action_log_prob(samples.observations)
            return -float(log_density.mean()) / groups
    return 0.0


@contextmanager
def global_generators(seed: int) -> Iterator[None]:
    """Seed the generators that SB3 draws from, and leave them as they were found."""
    found = np.random.get_state()  # noqa: NPY002 - SB3 shuffles minibatches with it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(found)  # noqa: NPY002
