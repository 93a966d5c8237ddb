"""Episodes, and the worker processes that run them."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from agents.baselines import Controller
from agents.policy import Policy
from asg_env.config import EnvSettings
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from asg_env.processes import follow_parent


@dataclass(frozen=True)
class Episode:
    """Record of one episode of T env steps with G layer groups.

    Attributes:
        instance: The training problem.
        observations: float32, shape (T, D): what each action was chosen on.
        actions: Shape (T, G); empty for hand-made controllers.
        rewards: float64, shape (T,).
        multipliers: float64, shape (T, G).
        progress: Share of inner steps over when each window began, and at the end, shape (T + 1,).
        ce: Window means in nats, shape (T,).
        kl: Window means in nats, shape (T,).
        accuracy: Accuracy, or what `metric` says instead, on outer_valid after each env step,
            shape (T,); empty if never read.
        diverged: Whether the training diverged.
        inner_steps: Inner steps taken.
        validation_images: Validation images that the episode evaluated: those of the reset, and
            what a hand-made controller looked at by itself, included.
    """

    instance: Instance
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    multipliers: np.ndarray
    progress: np.ndarray
    ce: np.ndarray
    kl: np.ndarray
    accuracy: np.ndarray
    diverged: bool
    inner_steps: int
    validation_images: int


def run_policy(
    env: LayerwiseLREnv, policy: Policy, instance: Instance, seed: int, deterministic: bool
) -> Episode:
    """Run one episode under a policy whose sampled actions follow `seed`."""
    policy.seed(seed)
    state: Any = None

    def act(observation: np.ndarray, first: bool) -> tuple[np.ndarray, Any]:
        nonlocal state
        action, state = policy.predict(
            observation, state, np.array([first]), deterministic=deterministic
        )
        return action, env.step(action)

    return _run(env, instance, act)


def run_controller(env: LayerwiseLREnv, controller: Controller, instance: Instance) -> Episode:
    """Run one episode under a hand-made controller, at exact multipliers."""

    def act(observation: np.ndarray, first: bool) -> tuple[np.ndarray, Any]:
        if first:  # after the reset: the trainer stands at inner step 0
            controller.begin(instance, env.trainer)
        progress = env.trainer.inner_step / env.trainer.settings.total_steps
        return np.empty(0), env.step_multipliers(
            controller.multipliers(progress, None if first else env.telemetry)
        )

    return _run(env, instance, act)


def _run(
    env: LayerwiseLREnv,
    instance: Instance,
    act: Callable[[np.ndarray, bool], tuple[np.ndarray, Any]],
) -> Episode:
    observation, info = env.reset(options={"instance": instance})
    before = env.trainer.images_evaluated - env.images_per_measurement
    rows: list[tuple[Any, ...]] = []
    terminated = False
    while not terminated:
        progress = env.trainer.inner_step / env.trainer.settings.total_steps
        action, (following, reward, terminated, _, info) = act(observation, not rows)
        rows.append(
            (
                observation,
                action,
                reward,
                info["lr_multipliers"],
                progress,
                info["loss/ce"],
                info["loss/kl"],
                info.get(f"{env.settings.metric}/outer_valid"),
            )
        )
        observation = following
    observations, actions, rewards, multipliers, progresses, ce, kl, accuracy = (
        np.asarray(column) for column in zip(*rows, strict=True)
    )
    ended = env.trainer.inner_step / env.trainer.settings.total_steps
    return Episode(
        instance,
        observations,
        actions,
        rewards,
        multipliers,
        np.append(progresses, ended),
        ce,
        kl,
        accuracy if rows[0][-1] is not None else np.empty(0),
        info["diverged"],
        info["inner_step"],
        env.trainer.images_evaluated - before,
    )


_worker: Any = None  # what the jobs of this process work with, or why there is none


def _start_worker(build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _worker
    follow_parent()
    torch.set_num_threads(1)
    try:
        _worker = build(*arguments)
    except Exception as error:  # raised here, it would break the pool and be lost: see `_call`
        _worker = error


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    function, arguments = job
    if isinstance(_worker, Exception):
        raise _worker
    return function(_worker, *arguments)


class WorkerPool:
    """N worker processes with one torch thread each, and what `build(*arguments)` returns there.

    Results come in the order of the jobs and depend on the jobs alone, so they are the same
    bytes whatever N is. With 0 workers the jobs are done in this process, which must then have
    set one torch thread itself.
    """

    def __init__(self, workers: int, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.here: Any = None if workers else build(*arguments)
        self._executor: ProcessPoolExecutor | None = None
        if not workers:
            return
        self._others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["agents.rollout"])
        self._executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(build, arguments)
        )

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield `function(what was built, *job)` for every job, in order."""
        if self._executor is None:
            return (function(self.here, *job) for job in jobs)
        return self._executor.map(_call, ((function, job) for job in jobs))

    def submit(self, function: Callable[..., Any], job: tuple[Any, ...]) -> Future[Any]:
        """Start `function(what was built, *job)` in a worker; there must be one."""
        assert self._executor is not None
        return self._executor.submit(_call, (function, job))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is None:
            return
        self._executor.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:  # nobody waits for jobs that may take hours
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()


class RolloutPool(WorkerPool):
    """Workers with an environment each."""

    def __init__(self, task: str, settings: EnvSettings, workers: int) -> None:
        super().__init__(workers, LayerwiseLREnv, (task, settings, None, max(1, workers)))
