"""Fixtures of the agents' tests: tiny settings, environments built once, no worker processes."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import agents.reinforce
import agents.train
from agents.experiment import Experiment, RunFolder
from agents.rollout import Episode
from asg_env.config import EnvSettings, validate
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance

TASK = "ASG/Digits-v0"
TINY_ENV = {"horizon": 3, "inner_steps": 2, "outer_valid_size": 50, "observation": "scaled"}
TINY_EXPERIMENT = {
    "env": {"id": TASK, "instances": "unknown-scale", **TINY_ENV},
    "agent": {
        "kind": "reinforce",
        "updates": 2,
        "instances_per_update": 2,
        "rollouts_per_instance": 2,
        "hidden_size": 4,
    },
    "train": {"workers": 1, "test_instances": 2, "tuning_instances": 1, "search_episodes": 4},
    "seed": 3,
}
_environments: dict[str, LayerwiseLREnv] = {}


def environment(settings: EnvSettings) -> LayerwiseLREnv:
    key = settings.model_dump_json()
    if key not in _environments:
        _environments[key] = LayerwiseLREnv(TASK, settings)
    return _environments[key]


class InlinePool:
    """Stands in for `RolloutPool`: the same jobs in the same order, in this process.

    Jobs are copied, as pickling does on the way to a worker.
    """

    def __init__(self, task: str, settings: EnvSettings, workers: int = 1) -> None:
        assert task == TASK
        self.env = environment(settings)

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        for job in list(jobs):
            yield function(self.env, *copy.deepcopy(job))

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def make_settings() -> Callable[..., EnvSettings]:
    def make(**changes: Any) -> EnvSettings:
        return validate(EnvSettings, {**TINY_ENV, **changes}, "env")

    return make


@pytest.fixture(scope="session")
def make_env(make_settings: Callable[..., EnvSettings]) -> Callable[..., LayerwiseLREnv]:
    """Tiny environments, each built once and shared: reset them before use."""

    def make(**changes: Any) -> LayerwiseLREnv:
        return environment(make_settings(**changes))

    return make


@pytest.fixture
def env(make_env: Callable[..., LayerwiseLREnv]) -> LayerwiseLREnv:
    return make_env()


@pytest.fixture
def instance() -> Instance:
    return Instance(TASK, head_seed=11, data_seed=12)


@pytest.fixture(scope="session")
def inline_pool() -> type[InlinePool]:
    return InlinePool


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and estimates run their episodes in this process."""
    monkeypatch.setattr(agents.reinforce, "RolloutPool", InlinePool)
    monkeypatch.setattr(agents.train, "RolloutPool", InlinePool)


def experiment_values(**sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(TINY_EXPERIMENT)
    for name, section in sections.items():
        if isinstance(section, dict):
            values[name].update(section)
        else:
            values[name] = section
    return values


@pytest.fixture(scope="session")
def make_values() -> Callable[..., dict[str, Any]]:
    """Values of an experiment file; keyword arguments change entries of its sections."""
    return experiment_values


@pytest.fixture(scope="session")
def make_experiment() -> Callable[..., Experiment]:
    return lambda **sections: Experiment(experiment_values(**sections))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A trained run that tests only read; those that write take a copy."""
    run = RunFolder.create(
        tmp_path_factory.mktemp("trained") / "run", Experiment(experiment_values()), False, False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.reinforce, "RolloutPool", InlinePool)
        agents.train.train(run, lambda *_: None)
    return run


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Records of episodes that no network was trained for."""

    def make(
        rewards: Any,
        actions: Any = None,
        observations: Any = None,
        accuracy: Any = (),
        diverged: bool = False,
    ) -> Episode:
        steps = len(rewards)
        return Episode(
            instance=Instance(TASK, 0, 0),
            observations=np.asarray(
                np.zeros((steps, 1)) if observations is None else observations, np.float32
            ),
            actions=np.asarray(np.zeros((steps, 1)) if actions is None else actions, np.int64),
            rewards=np.asarray(rewards, np.float64),
            multipliers=np.ones((steps, 1)),
            progress=np.arange(steps + 1) / steps,
            ce=np.ones(steps),
            kl=np.zeros(steps),
            accuracy=np.asarray(accuracy, np.float64),
            diverged=diverged,
            inner_steps=2 * steps,
            validation_images=50 * (steps + 1),
        )

    return make


@pytest.fixture
def asg(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Run the command `asg` in this process; return its status, stdout and stderr."""
    from agents.cli import main

    def run(*arguments: str | Path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["asg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return SimpleNamespace(status=stop.value.code, out=captured.out, err=captured.err)

    return run
