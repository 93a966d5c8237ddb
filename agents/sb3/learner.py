"""Agents of stable-baselines3 and sb3-contrib, behind the same commands as our own.

The algorithms are SB3's, unchanged; what a settings class does not list is SB3's default. Here
stand only their environments, seeds and checkpoints.

Every update seeds all generators and resets its environments from (seed, update). An episode that
is still running at the end of an update (because one before it diverged) is not gone on with; PPO
and its like credit it with the critic's value. What is carried from update to update is networks,
optimizers, statistics of the normaliser, the replay buffer and a few counts, and all of that
stands in the checkpoint: a resumed training of any of them goes on as if it had not been
interrupted, on the same machine and versions. The number of environments is a setting of the
agent, so that `train.workers` changes no result.

A checkpoint is a zip that SB3's own `load` reads (agents.sb3.checkpoint).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agents.sb3.box_settings import (
    ARSSettings,
    CrossQSettings,
    SACSettings,
    TD3Settings,
    TQCSettings,
)
from agents.sb3.settings import (
    A2CSettings,
    PPOSettings,
    RecurrentPPOSettings,
    SB3Settings,
    TRPOSettings,
)
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed
from asg_env.validation import ConfigError

try:
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv
    from torch.nn.utils import parameters_to_vector

    from agents.sb3.algorithms import (
        build_model,
        build_normaliser,
        entropy_of,
        global_generators,
        set_statistics,
        spaces_of,
        statistics_of,
    )
    from agents.sb3.callbacks import Callbacks, Evaluations
    from agents.sb3.checkpoint import load_normaliser, one_sentence, read, read_buffer, write
    from agents.sb3.envs import CountedEnvs, end_environments, start_environments
    from agents.sb3.policy import SB3Policy
except ModuleNotFoundError as error:
    if error.name not in ("stable_baselines3", "sb3_contrib"):  # something that they need
        raise
    raise ConfigError(
        "this agent needs stable-baselines3 and sb3-contrib; pip install 'asg-env[sb3]'"
    ) from None

__all__ = [
    "CHECKPOINT",
    "A2CSettings",
    "ARSSettings",
    "CrossQSettings",
    "Learner",
    "PPOSettings",
    "RecurrentPPOSettings",
    "SACSettings",
    "TD3Settings",
    "TQCSettings",
    "TRPOSettings",
    "load_normaliser",
    "load_policy",
]

CHECKPOINT = "last.zip"


class Learner:
    """What `asg train` drives: an SB3 algorithm, its environments and its checkpoint.

    Args:
        task: Environment id.
        env: Settings of every environment.
        settings: Of the agent.
        seed: All draws follow from it.
        workers: 0: all environments run in this process, which must have one torch thread. Any
            other number: each of `settings.environments` is a process of its own. The results
            are the same bits.

    Attributes:
        folder: Where the files of `evaluate_every` and `keep_every` are written; needed for them.
        updates: Updates of the whole training.

    Raises:
        ConfigError: The agent cannot be trained on this environment.
    """

    def __init__(
        self, task: str, env: EnvSettings, settings: SB3Settings, seed: int, workers: int
    ) -> None:
        settings.check(env)
        self.folder: Path | None = None
        self.updates = settings.updates
        self._task, self._env, self._settings, self._seed = task, env, settings, seed
        self._processes = workers > 0
        self._spaces = spaces_of(task, env)
        self._episodes = 0
        self._evaluations: Evaluations = {"timesteps": [], "results": [], "ep_lengths": []}
        self._normaliser = build_normaliser(settings, self._spaces)
        with global_generators(derive_seed(seed, "policy")):
            # Any: what is used besides BaseAlgorithm is of one or the other algorithm.
            self._model: Any = build_model(settings, self._spaces, settings.steps_per_update(env))
        self._first_lstm_states = getattr(self._model, "_last_lstm_states", None)  # zeros

    @property
    def policy(self) -> SB3Policy:
        """The policy as trained so far."""
        weights = {name: value.numpy() for name, value in self._model.policy.state_dict().items()}
        statistics = statistics_of(self._normaliser)
        return SB3Policy(self._spaces, self._settings, weights, statistics)

    def train(self, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (update, metrics) from update `start` on."""
        count = self._settings.environments
        envs = start_environments(self._task, self._env, count, self._processes)
        try:
            yield from self.train_on(envs, start)
        except BaseException:
            end_environments(envs)
            raise
        envs.close()

    def train_on(self, envs: VecEnv, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Train on running environments; see `train`.

        Args:
            envs: `settings.environments` of them, each in a `Monitor`.
            start: First update.

        Yields:
            The update and its metrics: those of REINFORCE, but for the gradient norm, which SB3
            does not report; `entropy` as `agents.sb3.algorithms.entropy_of` says; and SB3's own, by
            its names: `rollout/...` of the update's episodes, `train/...` of its last gradient
            steps, `eval/...` after an evaluation. `episodes` counts finished ones, inner steps and
            images also those of episodes cut by the update's end. Evaluations are in none of these.

        Raises:
            ValueError: `folder` is None, and evaluations or kept models are asked for.
        """
        counted = CountedEnvs(envs, self._env.metric)
        trained_on: VecEnv = counted
        if self._normaliser is not None:
            self._normaliser.venv = counted  # it keeps its statistics
            self._normaliser.num_envs = counted.num_envs
            trained_on = self._normaliser
        self._model.set_env(trained_on)
        callbacks = Callbacks(
            self._settings,
            self.folder,
            self._seed,
            self._model,
            envs,
            self._normaliser,
            self._evaluations,
        )
        for update in range(start, self.updates):
            timesteps = self._model.num_timesteps
            logged = self._one_update(update, counted, trained_on)
            # ARS counts an env step several times, with several environments.
            self._model.num_timesteps = timesteps + counted.env_steps
            self._episodes += len(counted.returns)
            evaluated = callbacks.after(update, self._progress(update))
            yield (
                update,
                {
                    "episodes": self._episodes,
                    **counted.summary(),
                    **logged,
                    "time/total_timesteps": self._model.num_timesteps,
                    **evaluated,
                },
            )

    def _one_update(
        self, update: int, counted: CountedEnvs, trained_on: VecEnv
    ) -> dict[str, float]:
        """Let SB3 learn for one update; return the entropy and what SB3 logged."""
        settings, model = self._settings, self._model
        counted.begin(derive_seed(self._seed, "environments", update))
        # Off-policy algorithms draw their first actions from the space's own generator.
        model.action_space.seed(derive_seed(self._seed, "random-actions", update))
        model.set_env(trained_on)  # makes `learn` reset them
        if self._first_lstm_states is not None:
            model._last_lstm_states = self._first_lstm_states
        # One of our own, because `learn` otherwise makes a temporary folder for every update.
        model.set_logger(Logger(folder=None, output_formats=[]))
        steps = settings.steps_per_update(self._env) * settings.environments
        if isinstance(settings, ARSSettings):
            steps = 1  # it ends after the first step of its search, which is the whole update
        with global_generators(derive_seed(self._seed, settings.kind, update)):
            # SB3 must not clear its logger: it is read here.
            model.learn(steps, log_interval=sys.maxsize, reset_num_timesteps=False)
            groups = int(self._spaces[1].shape[0]) if self._spaces[1].shape else 1
            entropy = entropy_of(model, groups)
        logged = {
            name: float(value)
            for name, value in model.logger.name_to_value.items()
            if name.startswith(("train/", "rollout/"))
        }
        return {"entropy": entropy, **logged}

    def save(self, path: Path, update: int) -> None:
        """Write everything that the next update depends on."""
        write(path, self._model, statistics_of(self._normaliser), self._progress(update))

    def load(self, path: Path) -> int:
        """Read a checkpoint; return the number of finished updates.

        Raises:
            ConfigError: The file is damaged or belongs to another agent.
        """
        model = self._model
        with one_sentence(path):
            stored = read(path)
            model.set_parameters(stored.tensors, device="cpu")
            for name in model._get_torch_save_params()[1]:  # SAC's temperature, for instance
                getattr(model, name).data.copy_(stored.variables[name].data)
            if isinstance(self._settings, ARSSettings):  # it keeps its weights a second time
                model.weights = parameters_to_vector(model.policy.parameters()).detach()
            if self._normaliser is not None:
                set_statistics(self._normaliser, stored.statistics)
            read_buffer(path, model)
            progress = stored.progress
            updates, self._episodes = int(progress["updates"]), int(progress["episodes"])
            model.num_timesteps = int(progress["timesteps"])
            model._n_updates = int(progress["gradient_updates"])
            for name, values in self._evaluations.items():
                values[:] = progress["evaluations"][name]
        return updates

    def _progress(self, update: int) -> dict[str, Any]:
        """What is finished, in numbers."""
        return {
            "updates": update + 1,
            "episodes": self._episodes,
            "timesteps": self._model.num_timesteps,
            "gradient_updates": self._model._n_updates,
            "evaluations": self._evaluations,
        }


def load_policy(path: Path, experiment: Any) -> SB3Policy:
    """Policy of a checkpoint; see `Learner.load` for errors."""
    both = spaces_of(experiment.task, experiment.env)
    with one_sentence(path):
        stored = read(path)
        weights = {name: value.numpy() for name, value in stored.tensors["policy"].items()}
        return SB3Policy(both, experiment.agent, weights, stored.statistics)
