import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import agents.cli.fit
import agents.cli.info
import agents.cli.main
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import load_task

TASK = "ASG/Digits-v0"


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 200)
        yield


@pytest.fixture
def write(tmp_path, make_values):
    """Write an experiment file; keyword arguments change its sections."""

    def write_(**sections):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(make_values(**sections)), encoding="utf-8")
        return path

    return write_


@pytest.fixture
def no_estimate(monkeypatch):
    minutes = {"training": 1.0, "comparison": 2.0, "seconds_per_episode": 0.1}
    monkeypatch.setattr(agents.cli.main, "estimate_minutes", lambda *_: minutes)


@pytest.fixture
def inline(monkeypatch, inline_pool, no_workers, no_estimate):
    """Everything runs in this process."""
    monkeypatch.setattr("agents.evaluate.RolloutPool", inline_pool)
    monkeypatch.setattr("agents.cli.export.RolloutPool", inline_pool)


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A trained run of one's own."""
    shutil.copytree(trained_run.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def schedule() -> LearnedSchedule:
    generator = np.random.default_rng(0)
    return LearnedSchedule(
        layer_groups=dict(load_task(TASK).layer_groups),
        knots=(0.0, 1 / 3, 2 / 3),
        multipliers=tuple(map(tuple, generator.random((3, 5)).tolist())),
        spread=((0.0,) * 5,) * 3,
        base_lr=0.3,
        optimizer="sgd",
        momentum_form="pytorch",
        lr_factor="constant",
        episodes=1,
        task=TASK,
        instances="fixed",
        base_lr_scale=1.0,
        inner_steps=6,
        settings={"horizon": 3, "inner_steps": 2, "outer_valid_size": 50},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_values) -> Path:
    """`asg train`, with real worker processes, from an experiment file to figures."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(make_values()), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["asg", "train", str(path), "--out", str(folder / "run")])
        with pytest.raises(SystemExit) as stop:
            agents.cli.main.main()
    assert stop.value.code == 0
    return folder / "run"


@pytest.fixture
def done(finished, tmp_path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "done")
    return tmp_path / "done"
