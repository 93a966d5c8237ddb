"""SB3's EvalCallback and CheckpointCallback, called at the ends of updates."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.sb3.algorithms import frozen_normaliser, global_generators, statistics_of
from agents.sb3.checkpoint import add_entries
from agents.sb3.envs import CountedEnvs
from agents.sb3.settings import SB3Settings
from asg_env.core.seeding import derive_seed

EVALUATION_EPISODES = 8  # of every evaluation, on the same train instances each time

Evaluations = dict[str, list[Any]]  # timesteps, results and ep_lengths of evaluations.npz


class Callbacks:
    """Writes what `evaluate_every` and `keep_every` ask for, where users of SB3 look for it.

    `evaluations.npz` and `best_model.zip` by greedy actions on train instances;
    `rl_model_*_steps.zip` are models that later ones do not replace. Evaluations run in the
    environments of the training, which every update resets anyway.

    Args:
        settings: Of the agent.
        folder: Where to write.
        seed: Of the training.
        model: Set to the environments of the training.
        envs: These environments, without normaliser.
        normaliser: Of the training.
        evaluations: Those before, from a checkpoint; it grows.

    Raises:
        ValueError: There is something to write, and no folder.
    """

    def __init__(
        self,
        settings: SB3Settings,
        folder: Path | None,
        seed: int,
        model: BaseAlgorithm,
        envs: VecEnv,
        normaliser: VecNormalize | None,
        evaluations: Evaluations,
    ) -> None:
        self._settings, self._seed, self._normaliser = settings, seed, normaliser
        if settings.evaluate_every is None and settings.keep_every is None:
            return
        if folder is None:
            raise ValueError("`folder` must be set for evaluate_every and keep_every, got None")
        self._folder = folder
        self._keep = CheckpointCallback(save_freq=1, save_path=str(folder))
        counted = CountedEnvs(envs)  # apart from what is counted of the training
        counted.begin(derive_seed(seed, "evaluation"))
        self._evaluate = EvalCallback(
            counted
            if normaliser is None
            else frozen_normaliser(statistics_of(normaliser), counted),
            n_eval_episodes=EVALUATION_EPISODES,
            eval_freq=1,
            log_path=str(folder),
            best_model_save_path=str(folder),
            verbose=0,
        )
        self._evaluate.evaluations_timesteps = evaluations["timesteps"]
        self._evaluate.evaluations_results = evaluations["results"]
        self._evaluate.evaluations_length = evaluations["ep_lengths"]
        means = [float(np.mean(results)) for results in evaluations["results"]]
        self._evaluate.best_mean_reward = max(means, default=-np.inf)
        self._keep.init_callback(model)
        self._evaluate.init_callback(model)

    def after(self, update: int, progress: dict[str, Any]) -> dict[str, float]:
        """Do what is due after an update.

        Args:
            update: The finished update.
            progress: For the zips, as a checkpoint has it.

        Returns:
            `eval/mean_reward` and `eval/mean_ep_length` after an evaluation.
        """
        evaluate = _is_due(self._settings.evaluate_every, update)
        keep = _is_due(self._settings.keep_every, update)
        if not (evaluate or keep):
            return {}
        found = {}
        # SB3 writes in place: elsewhere first, so that files are whole or not there.
        with TemporaryDirectory(prefix=".", dir=self._folder) as scratch:
            if evaluate:
                self._evaluate.best_model_save_path = scratch
                self._evaluate.log_path = f"{scratch}/evaluations"
                with global_generators(derive_seed(self._seed, "evaluation", update)):
                    self._evaluate.on_step()
                found = {
                    "eval/mean_reward": float(self._evaluate.last_mean_reward),
                    "eval/mean_ep_length": float(np.mean(self._evaluate.evaluations_length[-1])),
                }
            if keep:
                self._keep.save_path = scratch
                self._keep.on_step()
            for path in Path(scratch).iterdir():
                if path.suffix == ".zip":  # what a policy needs beside its weights
                    add_entries(path, statistics_of(self._normaliser), progress)
                os.replace(path, self._folder / path.name)
        return found


def _is_due(every: int | None, update: int) -> bool:
    return every is not None and (update + 1) % every == 0
