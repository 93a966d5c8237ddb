"""Benchmarks of two env steps, run in this process."""

import shutil

import pytest
import yaml

import agents.cli.benchmark
import agents.cli.main
from agents.benchmark import trials

SUITES = {
    "scale": {"id": "ASG/Digits-v0", "instances": "unknown-scale"},
    "still": {"id": "ASG/Digits-v0", "instances": "fixed"},
}
TINY = {"horizon": 2, "inner_steps": 1, "outer_valid_size": 50}
BENCHMARK = {
    "agents": {
        "gradient": {
            "agent": {"kind": "reinforce", "instances_per_update": 1, "rollouts_per_instance": 2}
        },
        "evolved": {"agent": {"kind": "es", "population": 2, "instances_per_update": 1}},
    },
    "baselines": ["cosine", "static-search", "random"],
    "episodes": 4,
    "seeds": 2,
    "test_instances": 2,
    "tuning_instances": 1,
}


def write_benchmark(folder, files=SUITES, **changes):
    """Write suites and the benchmark; return the path of the benchmark."""
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **values}), encoding="utf-8")
    values = {"suites": [str(folder / "scale.yaml")], "test": [str(folder / "still.yaml")]}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**values, **BENCHMARK, **changes}), encoding="utf-8")
    return path


def in_this_process(benchmark, waiting, root, workers, tick):
    """Stands in for `run_in_pool`."""
    for trial in waiting:
        error = None
        try:
            trials.run_trial(benchmark, trial, root)
        except Exception as failed:
            error = failed
        tick()
        yield trial, error


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 50)
        patch.setattr("agents.benchmark.trials.SELECTION_INSTANCES", 2)
        patch.setattr("agents.benchmark.trials.MODE_INSTANCES", 1)
        yield


@pytest.fixture
def suites():
    return SUITES


@pytest.fixture
def write_files():
    return write_benchmark


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(agents.cli.benchmark, "run_in_pool", in_this_process)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished benchmark and its file, which tests only read."""
    folder = tmp_path_factory.mktemp("benchmark")
    path = write_benchmark(folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.cli.benchmark, "run_in_pool", in_this_process)
        patch.setattr("sys.argv", ["asg", "benchmark", str(path), "--out", str(folder / "out")])
        with pytest.raises(SystemExit) as stop:
            agents.cli.main.main()
    assert stop.value.code == 0
    return path, folder / "out"


@pytest.fixture
def done(finished, tmp_path):
    """A finished benchmark of one's own."""
    path, out = finished
    shutil.copytree(out, tmp_path / "out")
    return path, tmp_path / "out"
