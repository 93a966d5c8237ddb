"""Stable-baselines3's PPO, behind the same commands as our own agent.

The algorithm is SB3's, unchanged: two tanh layers each for actor and critic, advantages by GAE,
its own value weight (0.5), gradient bound (0.5) and advantage normalisation. The network has no
memory: it acts on the last window alone. Here stand only its environments, seeds and checkpoints.

Every update seeds and resets its environments from (seed, update). An episode that is still
running at the end of an update (because one before it diverged) is credited with the critic's
value and not gone on with. So no state but network and optimizer is carried from update to
update, and a resumed training goes on as if it had not been interrupted, on the same machine and
versions. The number of environments is a setting of the agent, one process each, so that
`train.workers` changes no result.

A checkpoint is a zip that `stable_baselines3.PPO.load` reads. It holds pickles, which can run any
code when loaded: give PPO.load only files that you trust. What is read here is its tensors (with
torch's `weights_only`) and a JSON entry of ours.
"""

import json
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field, model_validator

from asg_env.actions import ACTIONS
from asg_env.config import ConfigError, EnvSettings, Settings
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.env import LayerwiseLREnv, task_of
from asg_env.observations import Observation

try:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.save_util import load_from_zip_file
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
except ModuleNotFoundError as error:
    if error.name != "stable_baselines3":  # something that it needs is missing
        raise
    raise ConfigError("agent ppo needs stable-baselines3; pip install 'asg-env[sb3]'") from None

PROGRESS = "asg-env.json"  # our entry of the zip: finished updates and episodes


class PPOSettings(Settings):
    """`agent:` of an experiment file, for `kind: ppo`."""

    kind: Literal["ppo"] = "ppo"
    updates: Annotated[int, Field(ge=1)] = 30
    episodes_per_update: Annotated[int, Field(ge=2)] = 32  # more where some diverge early
    environments: Annotated[int, Field(ge=1)] = 8  # [processes], whatever train.workers is
    hidden_size: Annotated[int, Field(ge=1)] = 64
    policy_lr: Annotated[float, Field(gt=0)] = 1e-3
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    entropy: Annotated[float, Field(ge=0)] = 0.002  # bonus per nat, summed over layer groups
    passes: Annotated[int, Field(ge=1)] = 4  # over each update's env steps
    minibatch_size: Annotated[int, Field(ge=2)] = 120  # [env steps]
    clip_ratio: Annotated[float, Field(gt=0)] = 0.2

    @model_validator(mode="after")
    def _check_combinations(self) -> "PPOSettings":
        if self.episodes_per_update % self.environments:
            raise ValueError(
                f"`episodes_per_update` must be a multiple of environments ({self.environments}), "
                f"got {self.episodes_per_update}; change one of them"
            )
        return self

    @property
    def episodes(self) -> int:
        """Training episodes in all, as far as none diverges."""
        return self.updates * self.episodes_per_update


class PPOPolicy:
    """A trained actor as a policy: samples from a generator of its own.

    It has its own copy of the weights, and can be sent to worker processes.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        hidden_size: int,
        weights: dict[str, np.ndarray],
    ) -> None:
        self._arguments = (observation_space, action_space, hidden_size)
        with torch.random.fork_rng(devices=[]):  # modules draw weights that are replaced below
            self._network = ActorCriticPolicy(
                observation_space, action_space, lambda _: 0.0, net_arch=[hidden_size] * 2
            )
        self._network.load_state_dict(
            {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        )
        self.seed(0)

    def __reduce__(self) -> tuple[Any, ...]:
        weights = {name: value.numpy() for name, value in self._network.state_dict().items()}
        return PPOPolicy, (*self._arguments, weights), {"_generator": self._generator}

    def seed(self, seed: int) -> None:
        """Seed the generator of sampled actions."""
        self._generator = numpy_generator(seed, "actions")

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, None]:
        """Choose an action; the network has no state, so `state` and `episode_start` are unread.

        Args:
            observation: Shape (D,).
            state: None.
            episode_start: Anything.
            deterministic: Take the likeliest action instead of sampling.

        Returns:
            The action, of the action space, and None.
        """
        if deterministic:
            return self._network.predict(observation, deterministic=True)[0], None
        with torch.random.fork_rng(devices=[]):  # SB3 samples from the global generator only
            torch.default_generator.manual_seed(int(self._generator.integers(2**63)))
            return self._network.predict(observation)[0], None


class _Tally(BaseCallback):
    """Adds up what one update costs and what its finished episodes reach."""

    def __init__(self, environments: int) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.accuracies: list[float] = []  # outer_valid at the end, 0 where it is not read
        self.diverged: list[bool] = []
        self.inner_steps = 0
        self.measurements = environments  # one for each reset, one for each step
        self._before = [0] * environments  # inner steps of the running episodes

    def _on_step(self) -> bool:
        for row, info in enumerate(self.locals["infos"]):
            self.inner_steps += info["inner_step"] - self._before[row]
            self._before[row] = info["inner_step"]
            self.measurements += not info["diverged"]
            if "episode" in info:  # Monitor's; the environment has been reset since
                self.returns.append(info["episode"]["r"])
                self.accuracies.append(info.get("accuracy/outer_valid", 0.0))
                self.diverged.append(info["diverged"])
                self.measurements += 1
                self._before[row] = 0
        return True


class _Spaces(gym.Env[np.ndarray, Any]):
    """Spaces alone: PPO is built and loaded on it before any process is started."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space


class Learner:
    """What `asg train` drives: SB3's PPO, its environments and its checkpoint.

    Args:
        task: Environment id.
        env: Settings of every environment.
        settings: Of the agent.
        seed: All draws follow from it.
        workers: Not read: each of `settings.environments` is a process, so that results are the
            same for any number of workers.
    """

    def __init__(
        self, task: str, env: EnvSettings, settings: PPOSettings, seed: int, workers: int
    ) -> None:
        self._task, self._env, self._settings, self._seed = task, env, settings, seed
        self._spaces = spaces_of(task, env)
        self._episodes = 0
        self.updates = settings.updates
        with _global_generators(derive_seed(seed, "policy")):
            self._model = PPO(
                "MlpPolicy",
                DummyVecEnv([partial(_Spaces, *self._spaces)] * settings.environments),
                learning_rate=settings.policy_lr,
                n_steps=(
                    len(env.windows()) * settings.episodes_per_update // settings.environments
                ),
                batch_size=settings.minibatch_size,
                n_epochs=settings.passes,
                gamma=settings.discount,
                gae_lambda=settings.gae_lambda,
                clip_range=settings.clip_ratio,
                ent_coef=settings.entropy,
                policy_kwargs={"net_arch": [settings.hidden_size] * 2},
                device="cpu",
            )
        # One of our own, because `learn` otherwise makes a temporary folder for every update.
        self._model.set_logger(Logger(folder=None, output_formats=[]))

    @property
    def policy(self) -> PPOPolicy:
        """The policy as trained so far."""
        return _policy(self._spaces, self._settings, self._model.policy.state_dict())

    def train(self, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (update, metrics) from update `start` on."""
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        processes = self._settings.environments
        make = partial(_start_environment, self._task, self._env, processes)
        envs = SubprocVecEnv([make] * processes, start_method="forkserver")
        try:
            yield from self.train_on(envs, start)
        except BaseException:
            for process in envs.processes:  # `close` would wait for answers, of dead ones too
                process.terminate()
            raise
        envs.close()

    def train_on(self, envs: VecEnv, start: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Train on running environments; see `train`.

        Args:
            envs: `settings.environments` of them, each in a `Monitor`.
            start: First update.

        Yields:
            The update and its metrics: `entropy` in nats per layer group, averaged over the
            passes; the others as REINFORCE's. SB3 reports no gradient norm. `episodes` counts
            finished ones, inner steps and images also those of episodes cut by the update's end.
        """
        images = envs.get_attr("images_per_measurement")[0]
        groups = int(np.prod(self._spaces[1].shape or (1,)))
        steps = self._model.n_steps * self._settings.environments
        for update in range(start, self.updates):
            tally = _Tally(self._settings.environments)
            envs.seed(derive_seed(self._seed, "environments", update))
            self._model.set_env(envs)  # makes `learn` reset them, with these seeds
            with _global_generators(derive_seed(self._seed, "ppo", update)):
                self._model.learn(steps, tally, reset_num_timesteps=False)
            self._episodes += len(tally.returns)
            entropy = -self._model.logger.name_to_value["train/entropy_loss"]
            yield (
                update,
                {
                    "episodes": self._episodes,
                    "return": float(np.mean(tally.returns)),
                    "accuracy": float(np.mean(tally.accuracies)),
                    "diverged": float(np.mean(tally.diverged)),
                    "entropy": float(entropy) / groups,
                    "inner_steps": tally.inner_steps,
                    "validation_images": tally.measurements * images,
                },
            )

    def save(self, path: Path, update: int) -> None:
        """Write SB3's zip and into it the number of finished updates and episodes."""
        temporary = path.with_name(path.name + ".tmp")
        self._model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(
                PROGRESS, json.dumps({"updates": update + 1, "episodes": self._episodes})
            )
        os.replace(temporary, path)

    def load(self, path: Path) -> int:
        """Read a checkpoint; return the number of finished updates.

        Raises:
            ConfigError: The file is damaged or belongs to another agent.
        """
        with _one_sentence(path):
            updates, episodes, tensors = _read(path)
            self._model.set_parameters(tensors, device="cpu")
        self._episodes = episodes
        return updates


def load_policy(path: Path, experiment: Any) -> PPOPolicy:
    """Policy of a checkpoint; see `Learner.load` for errors."""
    both = spaces_of(experiment.task, experiment.env)
    with _one_sentence(path):
        _, _, tensors = _read(path)
        return _policy(both, experiment.agent, tensors["policy"])


def spaces_of(task: str, env: EnvSettings) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    """Observation and action space of an environment, without building one."""
    groups = tuple(task_of(task, env).layer_groups)
    return (
        Observation(env.observation, groups, env.grid, env.further_terms()).space,
        ACTIONS[env.action](env.grid, len(groups)).space,
    )


def _policy(
    both: Sequence[spaces.Space[Any]], settings: PPOSettings, weights: dict[str, torch.Tensor]
) -> PPOPolicy:
    arrays = {name: value.numpy() for name, value in weights.items()}
    return PPOPolicy(both[0], both[1], settings.hidden_size, arrays)


def _start_environment(
    task: str, settings: EnvSettings, processes: int
) -> gym.Env[np.ndarray, Any]:
    """Build an environment in its process; it sets one torch thread there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    return Monitor(LayerwiseLREnv(task, settings, processes=processes))


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed the generators that SB3 draws from, and leave them as they were found."""
    found = np.random.get_state()  # noqa: NPY002 - SB3 shuffles minibatches with it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(found)  # noqa: NPY002


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint raises into a ConfigError."""
    try:
        yield
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        TypeError,
        UnpicklingError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{path} is no whole checkpoint of this agent ({reason}); "
            "restore it from a copy or train anew"
        ) from None


def _read(path: Path) -> tuple[int, int, dict[str, Any]]:
    """Return finished updates, finished episodes and SB3's tensors; unpickles nothing."""
    with zipfile.ZipFile(path) as archive:
        progress = json.loads(archive.read(PROGRESS))
    _, tensors, _ = load_from_zip_file(path, load_data=False, device="cpu")
    return int(progress["updates"]), int(progress["episodes"]), dict(tensors)


AgentSettings = PPOSettings
CHECKPOINT = "last.zip"
