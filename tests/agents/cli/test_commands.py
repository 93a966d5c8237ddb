import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import agents.cli.fit
import agents.cli.info
import agents.cli.main
from agents.baselines import FAMILIES
from agents.experiment import Experiment
from agents.run_folder import RunFolder
from asg_env.schedule import LearnedSchedule

TASK = "ASG/Digits-v0"


def test_train_dry_run_estimates_and_writes_nothing(asg, write, no_workers, tmp_path, monkeypatch):
    path = write()
    monkeypatch.chdir(tmp_path)
    result = asg("train", path, "--out", tmp_path / "run", "--dry-run")
    assert (result.status, result.err) == (0, "")
    assert "1 training seed(s) of 8 episodes" in result.out
    assert "minutes of training" in " ".join(result.out.split())
    assert list(tmp_path.iterdir()) == [path]


def test_train_reads_1e_3_as_a_number(asg, write, no_estimate, tmp_path):
    path = write()
    text = path.read_text(encoding="utf-8").replace(
        "  kind: reinforce\n", "  kind: reinforce\n  policy_lr: 1e-3\n"
    )
    path.write_text(text, encoding="utf-8")
    arguments = ["train", path, "--out", tmp_path / "run", "--dry-run"]
    assert asg(*arguments, "--set", "env.base_lr=1e-2").status == 0


def test_tasks_lists_every_task(asg):
    result = asg("tasks")
    assert result.status == 0
    assert TASK in result.out
    assert "handwritten" in result.out


def test_info_prints_versions_and_a_task(asg):
    versions = asg("info")
    assert versions.status == 0
    assert json.loads(versions.out)["provenance"]["packages"]["torch"] == torch.__version__
    result = asg("info", "--task", TASK, "--instances", "fixed")
    assert result.status == 0
    report = json.loads(result.out)
    task, instances = report["task"], report["test_instances"]
    assert list(task["layer_groups"]) == ["conv1", "conv2", "conv3", "conv4", "head"]
    assert task["splits"]["test"] == 1500
    assert len(instances) == 40
    assert {instance["base_lr_scale"] for instance in instances} == {1.0}


def test_help_lists_the_commands(asg):
    result = asg("--help")
    assert result.status == 0
    for command in ("train", "evaluate", "export", "fit", "tasks", "info"):
        assert command in result.out


def test_train_writes_the_promised_files(finished, make_values):
    assert {p.name for p in finished.iterdir()} == {
        "comparison.png",
        "config.yaml",
        "episodes.json",
        "known_scale.json",
        "provenance.json",
        "results.json",
        "results.md",
        "schedule.json",
        "seed-0",
    }
    assert {p.name for p in (finished / "seed-0").iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "search.json",
        "tensorboard",
    }
    assert Experiment(make_values()).digest() == RunFolder.open(finished).experiment.digest()
    assert (finished / "comparison.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in results["rows"]]
    assert set(FAMILIES) < set(names)
    markdown = (finished / "results.md").read_text(encoding="utf-8")
    assert all(name in markdown for name in names)
    schedule = LearnedSchedule.load(finished / "schedule.json")
    assert schedule.episodes == 16
    assert len(schedule.multipliers) == 3


def test_train_gives_what_the_library_gives(finished, trained_run):
    name = "seed-0/checkpoints/last.safetensors"
    assert (finished / name).read_bytes() == (trained_run.path / name).read_bytes()


def test_train_resumes_a_finished_run_without_changing_it(asg, write, done, inline):
    names = ("seed-0/checkpoints/last.safetensors", "results.json", "schedule.json")
    before = {name: (done / name).read_bytes() for name in names}
    assert asg("train", write(), "--out", done, "--resume").status == 0
    assert {name: (done / name).read_bytes() for name in names} == before


def test_train_overwrites_when_asked(asg, write, done, inline):
    (done / "leftover").write_text("", encoding="utf-8")
    result = asg("train", write(), "--out", done, "--overwrite", "--set", "seed=4")
    assert result.status == 0
    assert not (done / "leftover").exists()
    assert yaml.safe_load((done / "config.yaml").read_text(encoding="utf-8"))["seed"] == 4


def test_evaluate_repeats_the_results_of_training(asg, done, inline):
    before = (done / "results.json").read_bytes()
    (done / "results.json").unlink()
    (done / "comparison.png").unlink()
    result = asg("evaluate", done, "--instances", "2")
    assert (result.status, result.err) == (0, "")
    assert (done / "results.json").read_bytes() == before
    assert (done / "comparison.png").exists()
    assert "static search" in result.out


def test_evaluate_judges_another_run_beside(asg, done, run, inline):
    assert asg("evaluate", done, "--instances", "2", "--beside", run).status == 0
    rows = json.loads((done / "results.json").read_text(encoding="utf-8"))["rows"]
    assert rows[-1]["name"].startswith("run (reinforce")
    assert "controller_minus_this" in rows[-1]


def test_train_works_with_a_reward_that_reads_no_real_label(asg, write, inline, tmp_path):
    path = write(
        env={"reward": "train_loss"},
        agent={"updates": 1},
        train={"test_instances": 1},
    )
    result = asg("train", path, "--out", tmp_path / "run")
    assert (result.status, result.err) == (0, "")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert "accuracy not read" in result.out
    assert results["protocol"]["reward"] == "1 x train_loss"
    assert (tmp_path / "run" / "comparison.png").exists()


def test_train_counts_episodes_up_to_the_budget_of_all_seeds(
    asg, write, inline, tmp_path, monkeypatch
):
    """SB3 may finish more episodes than the budget says; the bar keeps within each seed's share."""

    def train(run, progress):
        for seed in range(2):
            for update, episodes in enumerate((4, 9)):
                progress(
                    seed,
                    update,
                    {"episodes": episodes, "return": 0.0, "accuracy": 0.0, "entropy": 0.0},
                )

    monkeypatch.setattr(agents.cli.main, "train", train)
    monkeypatch.setattr(agents.cli.main, "_evaluate", lambda *_: None)
    monkeypatch.setattr(agents.cli.main, "exported", lambda *_: None)
    monkeypatch.setattr(agents.cli.main, "write_schedule", lambda *_: None)
    told = asg("train", write(train={"seeds": 2}), "--out", tmp_path / "run").out
    assert re.findall(r"(\d+)/(\d+) episodes  seed (\d)", told) == [
        ("4", "16", "0"),
        ("8", "16", "0"),
        ("12", "16", "1"),
        ("16", "16", "1"),
    ]


def other_device(run: Path, device: str = "abacus") -> Path:
    """Write another device into a run's settings."""
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["env"]["device"] = device
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return run


@pytest.fixture
def no_pool(monkeypatch):
    def refuse(*_):
        raise AssertionError("an episode was about to run")

    monkeypatch.setattr("agents.evaluate.RolloutPool", refuse)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_run_whose_device_is_not_here_is_refused(fails, done, tmp_path, command):
    other_device(done)
    out = ["--out", tmp_path / "schedule.json"] if command == "export" else []
    assert "`device` must be a torch device of this machine" in fails(command, done, *out)


def test_a_run_beside_is_checked_before_anything_is_run(fails, done, run, no_pool, tmp_path):
    message = fails("evaluate", run, "--beside", other_device(done))
    assert "`device` must be a torch device of this machine" in message
    (done / "results.json").write_text("{", encoding="utf-8")
    other_device(done, "cpu")
    assert "is no whole comparison" in fails("evaluate", run, "--beside", done)
