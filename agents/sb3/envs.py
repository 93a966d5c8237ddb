"""Environments of an SB3 training: started in processes or here, and counted."""

import multiprocessing
import signal
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

from asg_env.config import EnvSettings
from asg_env.core.evaluation import Metric
from asg_env.env import LayerwiseLREnv


def start_environments(task: str, settings: EnvSettings, count: int, processes: bool) -> VecEnv:
    """Build environments, each in a `Monitor`.

    Args:
        task: Environment id.
        settings: Of every environment.
        count: How many.
        processes: Each in a process of its own, or all in this one; the results are the same
            bits, if this process has one torch thread.
    """
    make = partial(_environment, task, settings, count)
    if not processes:
        return DummyVecEnv([make] * count)
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return SubprocVecEnv([partial(_undisturbed, make)] * count, start_method="forkserver")


def end_environments(envs: VecEnv) -> None:
    """End their processes at once; `close` would wait for answers, of dead ones too."""
    for process in getattr(envs, "processes", ()):
        process.terminate()


def _environment(task: str, settings: EnvSettings, count: int) -> gym.Env[np.ndarray, Any]:
    return Monitor(LayerwiseLREnv(task, settings, processes=count))


def _undisturbed(make: partial[gym.Env[np.ndarray, Any]]) -> gym.Env[np.ndarray, Any]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    return make()


class CountedEnvs(VecEnvWrapper):
    """Adds up what one update costs and what its finished episodes reach.

    Every reset starts from the seed of the update. SB3 resets once in each update, ARS before each
    candidate: so all candidates of an update are judged on the same training problems. Rewards
    become float32 for both ways of running environments; SB3 does that for one of them. Gradients
    are on, because environments in this process train: ARS steps them without.
    """

    def __init__(self, envs: VecEnv, metric: Metric = "accuracy") -> None:
        super().__init__(envs)
        self._images_each = envs.get_attr("images_per_measurement")[0]
        self._metric = f"{metric}/outer_valid"
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Forget what was counted; every reset from now on starts from `seed`."""
        self._reset_seed = seed
        self.returns: list[float] = []
        self.lengths: list[int] = []  # [env steps]
        self.accuracies: list[float] = []  # metric on outer_valid at the end, 0 if it is not read
        self.diverged: list[bool] = []
        self.inner_steps = 0
        self.env_steps = 0
        self._measurements = 0
        self._before = [0] * self.num_envs  # inner steps of the running episodes

    @property
    def validation_images(self) -> int:
        """Validation images that were evaluated, resets included."""
        return int(self._measurements * self._images_each)

    def reset(self) -> Any:
        """Reset every environment, with the seed of the update."""
        self.venv.seed(self._reset_seed)
        self._measurements += self.num_envs
        self._before = [0] * self.num_envs
        with torch.enable_grad():
            return self.venv.reset()

    def step_wait(self) -> Any:
        """Count what the environments did."""
        with torch.enable_grad():
            observations, rewards, dones, infos = self.venv.step_wait()
        self.env_steps += self.num_envs
        for row, info in enumerate(infos):
            self.inner_steps += info["inner_step"] - self._before[row]
            self._before[row] = info["inner_step"]
            self._measurements += not info["diverged"]
            if "episode" in info:  # Monitor's; the environment has been reset since
                self.returns.append(float(info["episode"]["r"]))
                self.lengths.append(int(info["episode"]["l"]))
                self.accuracies.append(float(info.get(self._metric, 0.0)))
                self.diverged.append(bool(info["diverged"]))
                self._measurements += 1
                self._before[row] = 0
        return observations, rewards.astype(np.float32), dones, infos

    def summary(self) -> dict[str, float]:
        """Return the metrics of the update; means over no finished episode are nan."""

        def mean(values: list[Any]) -> float:
            return float(np.mean(values)) if values else float("nan")

        return {
            "return": mean(self.returns),
            "accuracy": mean(self.accuracies),
            "diverged": mean(self.diverged),
            "inner_steps": self.inner_steps,
            "validation_images": self.validation_images,
            "rollout/ep_rew_mean": mean(self.returns),
            "rollout/ep_len_mean": mean(self.lengths),
        }
