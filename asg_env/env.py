"""The environment: one env step trains the optimizee for a window at the agent's multipliers."""

import math
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import ResetNeeded

from asg_env.actions import ACTIONS
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.layer_groups import effective_lrs
from asg_env.core.optimizers import ONE_RATE, lr_factor
from asg_env.core.telemetry import Telemetry
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance, draw_instance, published_test_instances
from asg_env.observations import Observation
from asg_env.rendering import EpisodeHistory, render_ansi, render_rgb_array
from asg_env.rewards import LOSS_BOUND, Measurements, Reward, bounded_loss
from asg_env.task_settings import settings_class
from asg_env.validation import ConfigError, validate

RESET_BATCHES = 4  # training batches that the first observation looks at


class LayerwiseLREnv(gym.Env[np.ndarray, Any]):
    """Train a network on synthetic images; choose each layer group's learning rate.

    ## Description
    An episode is one training run of an instance: a network pretrained on real images is
    trained on labelled synthetic ones and has to work on real ones. Before every window of K
    inner steps the agent sets one multiplier per layer group; the group then trains at
    `base_lr * multiplier`. Follows ASG (ICML 2020); docs/original.md says where we differ.

    ## Action Space
    `grid`: `MultiDiscrete([M] * G)`, a level of the grid per group. `relative` (default):
    `MultiDiscrete([3] * G)`, one level down, stay, one up. `box`: `Box(-1, 1, (G,))`, the
    multiplier is 10**(1.5 (a - 1)).

    ## Observation Space
    A float32 `Box`, clipped; `env.unwrapped.observation_labels` names every index. The encodings
    `asg`, `scaled` (default), `extended` and `normalised` are described in
    `asg_env.observations`.

    ## Rewards
    A weighted sum of the terms of `asg_env.rewards`. Default `gain`: the gain in accuracy on
    real validation images (`outer_valid`) since the last env step. Undiscounted, it adds up to
    final minus initial accuracy. The test split is never read.

    ## Starting State
    `reset(seed)` draws an instance of the set; `reset(options={"instance": ...})` pins one. The
    backbone is pretrained, the head fresh, the multipliers stand at `start_multiplier`, and no
    inner step is taken.

    ## Episode End
    Terminated at the horizon, which defines the task and which the observation carries as
    progress, and on divergence (a loss, gradient norm or weight that is not finite): then the
    accuracy counts as 0, every number stays finite, and `info["cause"]` says what happened.
    Never truncated by the environment itself.

    ## Arguments
    `settings`: see `asg_env.config.EnvSettings` and docs/environment.md. `render_mode`: `ansi`
    or `rgb_array`. `processes`: see `build_trainer`.

    ## Version History
    v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        task: str,
        settings: EnvSettings,
        render_mode: str | None = None,
        processes: int = 1,
    ) -> None:
        if multiprocessing.parent_process() is not None:
            # One thread per worker process: bits change with the thread count, and a forked
            # child's backward pass can hang when its parent used several.
            torch.set_num_threads(1)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(
                f"`render_mode` must be one of {self.metadata['render_modes']} or None, got "
                f"{render_mode!r}; leave it out"
            )
        if settings.optimizer in ONE_RATE:
            raise ConfigError(
                "`optimizer` must take a rate for each layer group, got "
                f"{settings.optimizer}, which takes one for all; use it in asg fit or asg compare"
            )
        self.render_mode = render_mode
        self.settings = settings
        self.task_id = task
        self._processes = processes
        self._trainers: dict[str, Trainer] = {}  # by the task's own settings
        self.trainer = self._trainer_for(settings)
        groups = self.trainer.layer_groups
        self._action = ACTIONS[settings.action](settings.grid, len(groups))
        self._observation = Observation(
            settings.observation, groups, settings.grid, self.trainer.guidance.extra
        )
        self._reward = Reward(settings.reward)
        self._windows = settings.windows()  # of the instance, from the first reset on
        self._measured = tuple(
            dict.fromkeys(
                self._reward.splits
                + (("inner_valid",) if self._observation.needs_inner_valid else ())
            )
        )
        self.action_space = self._action.space
        self.observation_space = self._observation.space
        self.observation_labels = self._observation.labels
        self.instance: Instance | None = None
        self._running = False

    @property
    def horizon(self) -> int:
        """Env steps of the instance's episode, if it does not diverge."""
        return len(self._windows)

    @property
    def images_per_measurement(self) -> int:
        """Validation images that are evaluated at every reset and env step."""
        return sum(len(self.trainer.splits[split]) for split in self._measured)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; `options={"instance": Instance or its dict}` pins the instance.

        Raises:
            ValueError: An option is unknown, or the instance is not of this task or has settings
                that do not fit it.
        """
        super().reset(seed=seed)
        instance = self._choose_instance(dict(options or {}))
        settings = self.settings.of(instance)
        self.trainer = self._trainer_for(settings)
        self.instance, self._windows = instance, settings.windows()
        self.trainer.reset(
            instance.head_seed,
            instance.data_seed,
            instance.base_lr_scale,
            settings.trainer_settings(),
        )
        self._step_index = 0
        self._multipliers: tuple[float, ...] = (self.settings.start_multiplier,) * len(
            self.trainer.layer_groups
        )
        self._running = True
        batches = min(RESET_BATCHES, self._windows[0])
        self._telemetry = self.trainer.initial_report(batches)
        self._measurements = self._measure()
        self.history = EpisodeHistory(self.trainer.layer_groups, self.horizon)
        info = self._info({name: 0.0 for name in self._reward.weights})
        return self._encode(self._telemetry.ce), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decode the action and train for one window.

        Raises:
            gymnasium.error.ResetNeeded: The episode is over or was never started.
            ValueError: The action is not in the action space.
        """
        if not self._running:
            raise ResetNeeded("the episode is over or was never started; call env.reset() first")
        given, dtype = np.asarray(action), self.action_space.dtype
        assert dtype is not None
        # No cast from float to integer: 1.7 is no index.
        castable = np.can_cast(given.dtype, dtype, casting="same_kind")
        if not castable or not self.action_space.contains(given.astype(dtype)):
            raise ValueError(f"action must lie in {self.action_space}, got {action!r}")
        return self.step_multipliers(self._action.decode(action, self._multipliers))

    def step_multipliers(
        self, multipliers: Sequence[float]
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Train for one window at exact multipliers, whatever the action encoding.

        Hand-made controllers use it; agents use `step`.

        Args:
            multipliers: Dimensionless, >= 0, shape (G,), input to head.
        """
        if not self._running:
            raise ResetNeeded("the episode is over or was never started; call env.reset() first")
        multipliers = tuple(float(m) for m in multipliers)
        telemetry = self.trainer.run(self._windows[self._step_index], multipliers)
        self._multipliers = multipliers  # only now: refused multipliers change nothing
        previous_ce, self._telemetry = self._telemetry.ce, telemetry
        before = self._measurements
        self._measurements = self._measure()
        self._step_index += 1
        terminated = self._step_index == self.horizon or self._telemetry.diverged
        self._running = not terminated
        terms = self._reward.terms(self._measurements, before, last=terminated)
        info = self._info(terms)
        self.history.append(info)
        return self._encode(previous_ce), self._reward.total(terms), terminated, False, info

    @property
    def telemetry(self) -> Telemetry:
        """The last window's report, for controllers that may read it."""
        return self._telemetry

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Where each layer group stands."""
        return self._multipliers

    def snapshot(self) -> dict[str, Any]:
        """Return the whole state of the episode; `restore` replays from it exactly."""
        if self.instance is None:
            raise ResetNeeded("nothing to snapshot before the first env.reset()")
        return {
            "trainer": self.trainer.snapshot(),
            "instance": self.instance,
            "step_index": self._step_index,
            "multipliers": self._multipliers,
            "telemetry": self._telemetry,
            "measurements": self._measurements,
            "history": self.history.copy(),
            "running": self._running,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot of this environment."""
        settings = self.settings.of(snapshot["instance"])
        self.trainer = self._trainer_for(settings)
        self.trainer.restore(snapshot["trainer"])
        self.instance, self._windows = snapshot["instance"], settings.windows()
        self._step_index = snapshot["step_index"]
        self._multipliers = snapshot["multipliers"]
        self._telemetry = snapshot["telemetry"]
        self._measurements = snapshot["measurements"]
        self.history = snapshot["history"].copy()
        self._running = snapshot["running"]

    def render(self) -> str | np.ndarray | None:
        """Draw the episode so far: multipliers as a heat map, losses and accuracy beside it."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode; pass it to gym.make")
            return None
        if self.instance is None:
            raise ResetNeeded("nothing to render before the first env.reset()")
        if self.render_mode == "ansi":
            return render_ansi(self.history)
        return render_rgb_array(self.history)

    def _trainer_for(self, settings: EnvSettings) -> Trainer:
        """Return the trainer of a network and its images; each is built once."""
        key = repr(settings.task_arguments())
        if key not in self._trainers:
            self._trainers[key] = build_trainer(self.task_id, settings, self._processes)
        return self._trainers[key]

    def _choose_instance(self, options: dict[str, Any]) -> Instance:
        pinned = options.pop("instance", None)
        if options:
            raise ValueError(f"reset options must be among 'instance', got {sorted(options)}")
        if pinned is None:
            if self.settings.split == "train":
                return draw_instance(self.task_id, self.settings.instances, self.np_random)
            listed = published_test_instances(self.task_id, self.settings.instances)
            return listed[int(self.np_random.integers(len(listed)))]
        instance = pinned if isinstance(pinned, Instance) else Instance.from_dict(pinned)
        if instance.task != self.task_id:
            raise ValueError(f"instance `task` must be {self.task_id}, got {instance.task}")
        return instance

    def _measure(self) -> Measurements:
        """Evaluate the splits that reward and observation need; bounds after divergence."""
        accuracy, recall, loss, agreement = {}, {}, {}, 0.0
        for split in self._measured:
            if self._telemetry.diverged:
                accuracy[split], recall[split], loss[split] = 0.0, 0.0, LOSS_BOUND
            elif split == "old_task":
                agreement = self.trainer.agreement(split)
            else:
                result = self.trainer.evaluate(split)
                accuracy[split], recall[split] = result.accuracy, result.mean_recall
                loss[split] = result.loss
        return Measurements(
            accuracy, loss, agreement, self._telemetry.objective, recall, self.settings.metric
        )

    def _progress(self) -> float:
        return self.trainer.inner_step / sum(self._windows)

    def _encode(self, previous_ce: float) -> np.ndarray:
        return self._observation.encode(
            self._telemetry,
            previous_ce,
            self._progress(),
            self._multipliers,
            self._measurements.loss.get("inner_valid", 0.0),
            self.trainer.chance_loss,
        )

    def _info(self, terms: dict[str, float]) -> dict[str, Any]:
        last = max(0, self.trainer.inner_step - 1)
        factor = lr_factor(self.settings.lr_factor, last, sum(self._windows))
        info: dict[str, Any] = {
            "layer_groups": self.trainer.layer_groups,
            "lr_multipliers": np.asarray(self._multipliers),
            "effective_lrs": np.asarray(
                effective_lrs(self.settings.base_lr, self._multipliers, factor)
            ),
            "inner_step": self.trainer.inner_step,
            "loss/ce": bounded_loss(self._telemetry.ce),
            "loss/kl": bounded_loss(self._telemetry.kl),
            **{
                f"loss/{term}": value if math.isfinite(value) else LOSS_BOUND
                for term, value in self._telemetry.guidance.items()
            },
            "diverged": self._telemetry.diverged,
            "cause": self._telemetry.cause,
        }
        info |= {f"reward/{name}": value for name, value in terms.items()}
        if "outer_valid" in self._measurements.accuracy:
            info["accuracy/outer_valid"] = self._measurements.accuracy["outer_valid"]
            info["mean_recall/outer_valid"] = self._measurements.mean_recall["outer_valid"]
        return info


def make_env(task: str, render_mode: str | None = None, **settings: Any) -> LayerwiseLREnv:
    """Entry point of `gym.make`.

    Raises:
        ConfigError: A setting is unknown or out of bounds.
    """
    return LayerwiseLREnv(task, validate(settings_class(task), settings, ""), render_mode)


def env_creator(config: Mapping[str, Any]) -> LayerwiseLREnv:
    """Build an environment from one mapping, as RLlib's `tune.register_env` asks for.

    Args:
        config: The arguments of `gym.make`: `id`, and beside it any settings and `render_mode`.

    Raises:
        ConfigError: The id is missing or unknown, or a setting is unknown or out of bounds.
    """
    settings = dict(config)
    task, render_mode = settings.pop("id", None), settings.pop("render_mode", None)
    if not isinstance(task, str):
        raise ConfigError(f"`id` must be an environment id such as ASG/Digits-v0, got {task!r}")
    return LayerwiseLREnv(task, validate(settings_class(task), settings, ""), render_mode)
