"""Fixtures of the agents' tests: tiny settings, environments built once, no worker processes."""

import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import agents.episodic
import agents.train
from agents.compare.plan import ComparisonSettings, Plan
from agents.compare.work import Comparison, TrialRunner
from agents.controller_file import Controller, ControllerRecord
from agents.coordinatewise import CoordinatewiseNetwork
from agents.experiment import Experiment
from agents.lstm_policy import LSTMPolicyNetwork
from agents.recurrent_policy import layout_of
from agents.rollout import Episode
from agents.run_folder import RunFolder
from asg_env.config import EnvSettings
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from asg_env.observations import Observation
from asg_env.task_settings import settings_class
from asg_env.tasks import load_task
from asg_env.validation import validate

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
        return validate(settings_class(TASK), {**TINY_ENV, **changes}, "env")

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
    monkeypatch.setattr(agents.episodic, "RolloutPool", InlinePool)
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
        patch.setattr(agents.episodic, "RolloutPool", InlinePool)
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
    from agents.cli.main import main

    def run(*arguments: str | Path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["asg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return SimpleNamespace(status=stop.value.code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def fails(asg: Callable[..., SimpleNamespace]) -> Callable[..., str]:
    """Run a command that must fail: status 2 and one sentence; return the sentence."""

    def run(*arguments: str | Path) -> str:
        result = asg(*arguments)
        assert result.status == 2, result.out + result.err
        assert result.err.startswith("asg: ")
        assert result.err.endswith("\n")
        assert result.err.count("\n") == 1, result.err
        assert "Traceback" not in result.out + result.err
        return str(result.err)

    return run


# Of comparisons


class TrialPool:
    """Stands in for the `WorkerPool` of a comparison: the same jobs in order, in this process.

    Jobs are copied, as pickling does on the way to a worker; `trainings` counts those that train
    by function.
    """

    def __init__(
        self,
        workers: int = 1,
        build: Callable[..., Any] = TrialRunner,
        arguments: tuple[Any, ...] = (TASK, 1),
    ) -> None:
        self.worker = build(*arguments)
        self.trainings: dict[str, int] = {}

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        for job in list(jobs):
            if function.__name__ in ("tuning_trial", "test_trial"):
                self.trainings[function.__name__] = self.trainings.get(function.__name__, 0) + 1
            yield function(self.worker, *copy.deepcopy(job))

    def __enter__(self) -> "TrialPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def trial_pool() -> type[TrialPool]:
    return TrialPool


@pytest.fixture(scope="session")
def make_plan(make_settings: Callable[..., EnvSettings]) -> Callable[..., Plan]:
    """Check rows of a comparison; keyword arguments change the environment's settings."""

    def make(
        rows: Sequence[dict[str, Any]],
        claims: Sequence[dict[str, Any]] = (),
        runs: Sequence[Path] = (),
        **env: Any,
    ) -> Plan:
        values = {"rows": list(rows), "claims": list(claims)}
        wanted = validate(ComparisonSettings, values, "file")
        return Plan(TASK, make_settings(**env), wanted, runs)

    return make


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Comparison]:
    """A comparison on two test instances; coefficients are tuned on one train instance."""

    def make(
        plan: Plan, folder: Path, seeds: int = 2, tuning: int = 1, tune_on: str = "outer_valid"
    ) -> Comparison:
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        return Comparison(plan, folder, seeds, tuning, tune_on)

    return make


@pytest.fixture(scope="session")
def without_seconds() -> Callable[..., Any]:
    """Finished rows as a file holds them, but for the time that trainings took."""

    def strip(rows: Sequence[dict[str, Any]]) -> Any:
        plain = json.loads(json.dumps(rows))
        for row in plain:
            for result in (result for seed in row["results"] for result in seed):
                del result["seconds"]
        return plain

    return strip


USER_CODE = """
from asg_env.core.objectives import squared_distance


class Anchor:  # the term weight_l2, times a factor
    def __init__(self, pretrained, factor=1.0):
        self.weights, self.anchors = pretrained.backbone()
        self.factor = factor

    def __call__(self, step):
        return self.factor * squared_distance(self.weights, self.anchors)


class Share:  # the rule uniform, at a share of the rate
    def __init__(self, groups, top, share=1.0):
        self.vector = [share * top] * groups

    def begin(self, instance, trainer):
        pass

    def multipliers(self, progress, telemetry):
        return self.vector
"""


@pytest.fixture
def user_code(tmp_path: Path) -> Path:
    """A file of the user's with a guidance term, `Anchor`, and a rule, `Share`."""
    path = tmp_path / "mine.py"
    path.write_text(USER_CODE, encoding="utf-8")
    return path


def _controller_for(
    settings: EnvSettings, kind: str = "coordinate-wise", greedy: bool = True
) -> Controller:
    """A controller of random weights, large enough that what it sees moves what it does."""
    generator = torch.Generator().manual_seed(5)
    layout, terms = layout_of(TASK, settings), settings.further_terms()
    groups = tuple(load_task(TASK).layer_groups)
    build = CoordinatewiseNetwork if kind == "coordinate-wise" else LSTMPolicyNetwork
    network = build(layout, 6, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 1.0, generator=generator)
    record = ControllerRecord(
        network={"kind": kind, "hidden_size": 6, "memoryless": False},
        encoding={
            "observation": settings.observation,
            "action": settings.action,
            "grid": settings.grid,
            "start_multiplier": settings.start_multiplier,
            "terms": terms,
        },
        greedy=greedy,
        task=TASK,
        instances="fixed",
        layer_groups=groups,
        labels=Observation(settings.observation, groups, settings.grid, terms).labels,
        horizon=len(settings.windows()),
        inner_steps=sum(settings.windows()),
        growing_windows=settings.windows() if isinstance(settings.inner_steps, str) else (),
        base_lr=settings.base_lr,
        optimizer="sgd",
        momentum_form=settings.momentum_form,
        lr_factor=settings.lr_factor,
        provenance={},
    )
    return Controller(record, dict(network.state_dict()))


@pytest.fixture(scope="session")
def controller_for() -> Callable[..., Controller]:
    """A controller of random weights for given settings."""
    return _controller_for
