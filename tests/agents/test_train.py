import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agents.run_folder import RunFolder, read_metrics
from agents.train import estimate_minutes, load_policies, train
from asg_env.validation import ConfigError

FOUR = {"agent": {"updates": 4}}


def start(path, experiment) -> RunFolder:
    return RunFolder.create(path, experiment, resume=False, overwrite=False)


def checkpoint(run: RunFolder, seed: int = 0) -> Path:
    return run.seed_folder(seed) / "checkpoints" / "last.safetensors"


def metrics(run: RunFolder) -> list[dict]:
    """Metrics without the clock."""
    lines = read_metrics(run.seed_folder(0))
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Stop(Exception):
    pass


def stop_after(update: int):
    def progress(seed, finished, values):
        if finished == update:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(make_experiment, inline_pool, tmp_path_factory) -> RunFolder:
    """Four updates without an interruption, in this process."""
    run = start(tmp_path_factory.mktemp("whole") / "run", make_experiment(**FOUR))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.episodic.RolloutPool", inline_pool)
        train(run, lambda *_: None)
    return run


def test_train_writes_metrics_checkpoint_and_events(whole):
    folder = whole.seed_folder(0)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["last.safetensors"]
    assert any(p.name.startswith("events") for p in (folder / "tensorboard").iterdir())
    lines = metrics(whole)
    assert [line["update"] for line in lines] == [0, 1, 2, 3]
    assert [line["episodes"] for line in lines] == [4, 8, 12, 16]
    assert all(line["inner_steps"] == 24 for line in lines)
    assert all(line["validation_images"] == 4 * 4 * 50 for line in lines)
    assert all(np.isfinite(list(line.values())).all() for line in lines)


def test_train_reports_every_update(make_experiment, no_workers, tmp_path):
    seen = []
    run = start(tmp_path / "run", make_experiment(train={"seeds": 2}))
    train(run, lambda seed, update, values: seen.append((seed, update, values["episodes"])))
    assert seen == [(0, 0, 4), (0, 1, 8), (1, 0, 4), (1, 1, 8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_train_gives_the_same_bytes_whatever_the_number_of_workers(
    make_experiment, whole, tmp_path, workers
):
    run = start(tmp_path / "run", make_experiment(train={"workers": workers}, **FOUR))
    train(run, lambda *_: None)
    assert checkpoint(run).read_bytes() == checkpoint(whole).read_bytes()
    assert metrics(run) == metrics(whole)


def test_train_gives_the_same_bytes_twice_and_others_for_another_seed(
    make_experiment, no_workers, whole, tmp_path
):
    same = start(tmp_path / "same", make_experiment(**FOUR))
    other = start(tmp_path / "other", make_experiment(seed=4, **FOUR))
    for run in (same, other):
        train(run, lambda *_: None)
    assert checkpoint(same).read_bytes() == checkpoint(whole).read_bytes()
    assert checkpoint(other).read_bytes() != checkpoint(whole).read_bytes()


def test_train_seeds_are_those_of_separate_runs(make_experiment, no_workers, tmp_path):
    both = start(tmp_path / "both", make_experiment(train={"seeds": 2}, seed=3))
    second = start(tmp_path / "second", make_experiment(seed=4))
    for run in (both, second):
        train(run, lambda *_: None)
    assert checkpoint(both, 1).read_bytes() == checkpoint(second).read_bytes()
    assert checkpoint(both, 0).read_bytes() != checkpoint(both, 1).read_bytes()


@pytest.mark.parametrize("update", [0, 1, 2])
def test_train_resumes_to_the_bytes_of_an_uninterrupted_run(
    make_experiment, no_workers, whole, tmp_path, update
):
    run = start(tmp_path / "run", make_experiment(**FOUR))
    with pytest.raises(Stop):
        train(run, stop_after(update))
    assert [line["update"] for line in metrics(run)] == list(range(update + 1))
    assert checkpoint(run).read_bytes() != checkpoint(whole).read_bytes()
    seen = []
    train(run, lambda seed, finished, values: seen.append(finished))
    assert seen == list(range(update + 1, 4))  # finished updates are not repeated
    assert checkpoint(run).read_bytes() == checkpoint(whole).read_bytes()
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize(
    "extra", [None, '{"update": 2, "episo', ""], ids=["whole-line", "torn-line", "torn-empty"]
)
def test_train_resumes_when_a_metrics_line_is_ahead_of_the_checkpoint(
    make_experiment, no_workers, whole, tmp_path, extra
):
    # Killed after the line of update 2 was written (or half of it), before its checkpoint.
    run = start(tmp_path / "run", make_experiment(**FOUR))
    with pytest.raises(Stop):
        train(run, stop_after(1))
    path = run.seed_folder(0) / "metrics.jsonl"
    third = (whole.seed_folder(0) / "metrics.jsonl").read_text().splitlines(keepends=True)[2]
    with path.open("a", encoding="utf-8") as file:
        file.write(third if extra is None else extra)
    train(run, lambda *_: None)
    assert checkpoint(run).read_bytes() == checkpoint(whole).read_bytes()
    assert metrics(run) == metrics(whole)


def test_train_survives_a_half_written_checkpoint_beside_the_last(
    make_experiment, no_workers, whole, tmp_path
):
    run = start(tmp_path / "run", make_experiment(**FOUR))
    with pytest.raises(Stop):
        train(run, stop_after(1))
    half = checkpoint(whole).read_bytes()[:100]
    checkpoint(run).with_name("last.safetensors.tmp").write_bytes(half)
    train(run, lambda *_: None)
    assert checkpoint(run).read_bytes() == checkpoint(whole).read_bytes()


def test_train_does_nothing_when_it_is_finished(make_experiment, no_workers, trained_run, tmp_path):
    shutil.copytree(trained_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    before = (run.seed_folder(0) / "metrics.jsonl").read_bytes()
    train(run, stop_after(0))
    assert (run.seed_folder(0) / "metrics.jsonl").read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from agents.run_folder import RunFolder
from agents.train import train

if __name__ == "__main__":
    def kill(seed, update, values):
        if update == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    train(RunFolder.open(Path(sys.argv[1])), kill)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_train_resumes_to_the_same_bytes_after_kill_9(make_experiment, no_workers, whole, tmp_path):
    run = start(tmp_path / "run", make_experiment(**FOUR))
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    killed = subprocess.run(
        [sys.executable, str(script), str(run.path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [line["update"] for line in metrics(run)] == [0, 1]
    train(run, lambda *_: None)
    assert checkpoint(run).read_bytes() == checkpoint(whole).read_bytes()
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_train_says_in_a_sentence_that_a_checkpoint_is_truncated(
    make_experiment, no_workers, trained_run, tmp_path, share
):
    shutil.copytree(trained_run.path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    content = checkpoint(run).read_bytes()
    checkpoint(run).write_bytes(content[: int(share * len(content))])
    for use in (lambda: train(run, lambda *_: None), lambda: load_policies(run)):
        with pytest.raises(ConfigError, match=r"no whole checkpoint .*train anew") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_load_policies_names_the_seed_without_a_checkpoint(make_experiment, tmp_path):
    run = start(tmp_path / "run", make_experiment(train={"seeds": 2}))
    with pytest.raises(ConfigError, match=r"no checkpoint of training seed 0; .*--resume"):
        load_policies(run)


def test_load_policies_returns_one_per_training_seed(make_experiment, no_workers, tmp_path):
    run = start(tmp_path / "run", make_experiment(train={"seeds": 2}, agent={"updates": 1}))
    train(run, lambda *_: None)
    first, second = load_policies(run)
    row = np.ones(9, np.float32)
    for policy in (first, second):
        policy.seed(0)
        assert policy.predict(row)[0].shape == (5,)
    name = "net.state_encoder.0.rnn.weight_ih_l0"
    assert not first.network.state_dict()[name].equal(second.network.state_dict()[name])


def test_metrics_are_empty_before_training(make_experiment, tmp_path):
    run = start(tmp_path / "run", make_experiment(train={"seeds": 2}))
    assert read_metrics(run.seed_folder(1)) == []


def test_experiment_check_refuses_what_fits_neither_task_nor_agent(make_experiment):
    with pytest.raises(ConfigError, match="`outer_valid_size` must be <= 1000"):
        make_experiment(env={"outer_valid_size": 5000}).check()
    with pytest.raises(ConfigError, match="`env.action` must be grid or relative"):
        make_experiment(env={"action": "box"}).check()


def test_experiment_check_puts_nothing_on_the_device(make_experiment, monkeypatch):
    monkeypatch.setattr("asg_env.build.Trainer", lambda *_: pytest.fail("it built a trainer"))
    make_experiment().check()
    with pytest.raises(ConfigError, match="`device` must be a torch device of this machine, got"):
        make_experiment(env={"device": "abacus"}).check()


def test_estimate_scales_one_episode_to_the_whole(make_experiment, no_workers):
    experiment = make_experiment(train={"seeds": 3})
    minutes = estimate_minutes(experiment, baseline_episodes=48)
    assert set(minutes) == {"training", "comparison", "seconds_per_episode"}
    assert minutes["seconds_per_episode"] > 0
    # 3 seeds x 8 episodes of training against 48 of comparison.
    assert minutes["comparison"] == pytest.approx(2 * minutes["training"])
    assert minutes["training"] == pytest.approx(24 * minutes["seconds_per_episode"] / 60)


def test_metrics_lines_are_json_objects_with_the_clock(whole):
    for line in (whole.seed_folder(0) / "metrics.jsonl").read_text().splitlines():
        assert {"update", "seconds", "return", "accuracy", "entropy"} <= set(json.loads(line))
