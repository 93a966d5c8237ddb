import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agents.cli.fit
import agents.cli.info
import agents.cli.main
from agents.run_folder import RunFolder
from agents.train import train
from asg_env.core.numerics import NotRepeatableError
from asg_env.tasks import TASK_MODULES
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"


# Mistakes in an experiment


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  horizon: 3\n", "  horizon: 3\n  speed: 1\n", "`env.speed` is unknown; known keys are"),
        ("  horizon: 3\n", "  horizon: 3\n  horizon: 3\n", "`horizon` is repeated in line"),
        ("  horizon: 3\n", "  horizon: 0\n", "`env.horizon` must be >= 1, got 0"),
        ("  horizon: 3\n", "  horizon: true\n", "`env.horizon` must be an integer, got True"),
        ("  horizon: 3\n", "  horizon: 1.5\n", "`env.horizon` must be an integer, got 1.5"),
        ("  horizon: 3\n", "  base_lr: .nan\n", "`env.base_lr` must be a finite number, got nan"),
        ("  horizon: 3\n", "  reward: speed\n", "`env.reward` must name a reward term"),
        (f"  id: {TASK}\n", "  id: ASG/None-v0\n", f"`env.id` must be one of {TASK}"),
        (
            "  kind: reinforce\n",
            "  kind: magic\n",
            "`agent.kind` must be one of reinforce, sequence-ppo, es, ppo",
        ),
        ("seed: 3\n", "seed: [3\n", "the text is not YAML in line"),
        ("seed: 3\n", "", ""),
    ],
    ids=[
        "unknown-key",
        "repeated-key",
        "horizon-0",
        "horizon-true",
        "horizon-1.5",
        "base-lr-nan",
        "unknown-reward",
        "unknown-task",
        "unknown-agent",
        "not-yaml",
        "control",
    ],
)
def test_train_refuses_a_wrong_experiment_file(
    fails, asg, write, no_estimate, tmp_path, old, new, message
):
    path = write()
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    if not message:  # without a mistake the same command works
        assert asg("train", path, "--out", tmp_path / "run", "--dry-run").status == 0
        return
    assert message in fails("train", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("env.horizon", "--set must look like KEY=VALUE, got 'env.horizon'"),
        ("=1", "--set must look like"),
        ("env.horizon=[", "--set env.horizon=[: the text is not YAML"),
        ("seed.a=1", "`seed` is no section"),
        ("env.horizon=true", "`env.horizon` must be an integer, got True"),
        ("agent.policy_lr=fast", "`agent.policy_lr` must be a number, got 'fast'"),
        ("env.action=box", "`env.action` must be grid or relative for this agent"),
    ],
)
def test_train_refuses_a_malformed_set(fails, write, inline, tmp_path, setting, message):
    assert message in fails("train", write(), "--out", tmp_path / "run", "--set", setting)


def test_train_refuses_an_unknown_experiment(fails, tmp_path):
    assert "digits-reinforce" in fails("train", "nowhere", "--out", tmp_path / "run")
    assert "cannot be read" in fails("train", "nowhere.yaml", "--out", tmp_path / "run")


# Mistakes with the output folder


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_train_refuses_a_folder_that_holds_a_run(fails, write, run, no_estimate, dry):
    assert "already holds a run; add --resume" in fails("train", write(), "--out", run, *dry)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_train_refuses_a_folder_that_is_not_empty(fails, write, no_estimate, tmp_path, dry):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine", encoding="utf-8")
    message = fails("train", write(), "--out", tmp_path / "out", *dry)
    assert "is not empty and holds no run" in message


def test_train_refuses_a_folder_below_a_file(fails, write, no_estimate, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = fails("train", write(), "--out", tmp_path / "file" / "run")
    assert "cannot be written" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--resume", "--dry-run"], "holds no run to resume"),
    ],
)
def test_train_refuses_to_resume_nothing(fails, write, no_estimate, tmp_path, flags, message):
    assert message in fails("train", write(), "--out", tmp_path / "run", *flags)


def test_train_refuses_to_resume_other_settings(fails, write, run, no_estimate):
    message = fails("train", write(), "--out", run, "--resume", "--set", "seed=9")
    assert "holds a run of other settings" in message


# Mistakes with runs, schedules and names


@pytest.mark.parametrize("command", ["evaluate", "export", "fit"])
def test_commands_refuse_a_folder_that_is_no_run(fails, tmp_path, command):
    arguments = {
        "evaluate": ["evaluate", tmp_path],
        "export": ["export", tmp_path, "--out", tmp_path / "schedule.json"],
        "fit": ["fit", TASK, "--controller", tmp_path, "--out", tmp_path / "model"],
    }[command]
    assert "is not a run folder" in fails(*arguments)


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        ("evaluate", "truncated"),
        ("export", "truncated"),
        ("fit", "truncated"),
        ("train", "truncated"),  # --resume
        ("evaluate", "missing"),
        ("export", "missing"),
        ("fit", "missing"),
    ],
)
def test_commands_refuse_a_run_without_a_whole_checkpoint(
    fails, run, write, inline, tmp_path, command, damage
):
    path = run / "seed-0" / "checkpoints" / "last.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    arguments = {
        "evaluate": ["evaluate", run],
        "export": ["export", run, "--out", tmp_path / "schedule.json"],
        "fit": ["fit", TASK, "--controller", run, "--out", tmp_path / "model"],
        "train": ["train", write(), "--out", run, "--resume"],
    }[command]
    expected = {"truncated": "is no whole checkpoint of this agent", "missing": "has no checkpoint"}
    assert expected[damage] in fails(*arguments)


@pytest.mark.parametrize(
    "arguments", [["--instances", "0"], ["--instances", "41"], ["--workers", "0"]]
)
def test_evaluate_refuses_numbers_out_of_range(fails, run, arguments):
    assert arguments[0] in fails("evaluate", run, *arguments)


def test_evaluate_refuses_to_compare_across_instance_sets(
    fails, run, make_experiment, inline, tmp_path
):
    for name, changes, message in (
        ("fixed", {"env": {"instances": "fixed"}}, "compare runs on the same instances"),
        ("seeds", {"train": {"seeds": 3}}, "compare runs of as many seeds"),
        ("digits", {"env": {"classes": [0, 1, 2, 3, 4]}}, "is on other images or another network"),
        (
            "longer",
            {"env": {"horizon": 4}},
            "trains with inner steps 8, what it stands beside with 6;",
        ),
        (
            "batch",
            {"env": {"batch_size": 16}},
            "trains with env.batch_size 16, what it stands beside with",
        ),
    ):
        experiment = make_experiment(agent={"updates": 1}, **changes)
        other = RunFolder.create(tmp_path / name, experiment, False, False)
        train(other, lambda *_: None)
        assert message in fails("evaluate", run, "--beside", other.path)


def test_info_refuses_an_unknown_task_and_set(fails):
    known = ", ".join(TASK_MODULES)
    assert f"`task` must be one of {known}, got 'nowhere'" in fails("info", "--task", "nowhere")
    assert (
        "--instances must be one of fixed, unknown-scale, mixed, transfer, got 'many'; give"
        in fails("info", "--task", TASK, "--instances", "many")
    )
    assert "--instances and --set belong to a task; add --task ID" in fails(
        "info", "--instances", "fixed"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly"),
        (["tasks", "--loudly"], "--loudly"),
        (["train"], "experiment"),
        (["train", "digits-reinforce"], "--out"),
        (["evaluate", "a", "b"], "b"),
    ],
)
def test_commands_say_in_a_sentence_how_they_are_used(fails, arguments, message):
    assert message.lower() in fails(*arguments).lower()


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["asg", "--debug", "evaluate", str(tmp_path)])
    with pytest.raises(ConfigError, match="is not a run folder"):
        agents.cli.main.main()


def test_main_does_not_hide_our_own_errors(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(agents.cli.info, "provenance", broken)
    monkeypatch.setattr(sys, "argv", ["asg", "info"])
    with pytest.raises(RuntimeError, match="a bug"):
        agents.cli.main.main()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "the device ran out of memory; lower env.batch_size, or the number of workers "
            "(train.workers, --workers)",
        ),
        (NotRepeatableError("`deterministic` must be false here"), "`deterministic` must be false"),
    ],
)
def test_what_the_device_cannot_do_is_said_in_a_sentence(fails, monkeypatch, error, message):
    def full():
        raise error

    monkeypatch.setattr(agents.cli.info, "provenance", full)
    assert message in fails("info")


def test_mistake_in_a_real_process_gives_status_2_and_one_line(write, tmp_path):
    path = write(env={"horizon": 0})
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "agents.cli.main",
            "train",
            str(path),
            "--out",
            str(tmp_path / "run"),
        ],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("asg: `env.horizon` must be >= 1, got 0")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["estimate_minutes", "train", "_evaluate", "exported"])
def test_interrupt_ends_with_130_and_says_how_to_go_on(
    asg, write, no_estimate, tmp_path, monkeypatch, stage
):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("train", "_evaluate", "exported"):
        monkeypatch.setattr(agents.cli.main, name, lambda *_: None)
    monkeypatch.setattr(agents.cli.main, stage, interrupted)
    path, out = write(), tmp_path / "run"
    result = asg("train", path, "--out", out, "--set", "seed=5", "--set", "env.reward={gain: 1}")
    assert result.status == 130
    resume = f"asg train {path} --out {out} --resume --set seed=5 --set 'env.reward={{gain: 1}}'"
    assert resume in result.out
    assert "Traceback" not in result.out + result.err
