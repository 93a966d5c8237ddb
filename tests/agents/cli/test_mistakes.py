import json
import shutil
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
from asg_env.schedule import LearnedSchedule
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
        ("env.horizon", "--set must look like agent.policy_lr=0.01, got 'env.horizon'"),
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


def other_groups(schedule: LearnedSchedule) -> dict[str, str]:
    return {f"other-{name}": pattern for name, pattern in schedule.layer_groups.items()}


def other_order(schedule: LearnedSchedule) -> dict[str, str]:
    return dict(reversed(schedule.layer_groups.items()))


@pytest.mark.parametrize("change", [other_groups, other_order])
def test_fit_refuses_a_schedule_for_other_groups(fails, schedule, tmp_path, change):
    path = tmp_path / "schedule.json"
    schedule.save(path)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["layer_groups"] = change(schedule)
    path.write_text(json.dumps(record), encoding="utf-8")
    message = fails("fit", TASK, "--schedule", path, "--out", tmp_path / "model")
    assert "is for the groups" in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has schedule version 2"),
        ({"base_lr": -1}, "`schedule.base_lr` must be > 0.0, got -1"),
        ({"settings": {"horizon": 0}}, "`schedule.settings.horizon` must be >= 1, got 0"),
        ({"settings": {"speed": 1}}, "`schedule.settings.speed` is unknown"),
        ({"settings": {"device": "abacus"}}, "`device` must be a torch device"),
        ({"settings": 3}, "`schedule.settings` must be a mapping, got 3"),
        ({"layer_groups": ["conv1"]}, "`schedule.layer_groups` must be a mapping"),
    ],
)
def test_fit_refuses_a_damaged_schedule(fails, schedule, tmp_path, changes, message):
    path = tmp_path / "schedule.json"
    schedule.save(path)
    record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert message in fails("fit", TASK, "--schedule", path, "--out", tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "magic"], "--baseline must be one of uniform,"),
        (["--baseline", "cosine:7"], "--baseline cosine has the candidates 1, 0.3,"),
        (["--schedule", "nowhere.json"], "nowhere.json cannot be read as a schedule"),
        ([], "give exactly one of --schedule, --controller and --baseline"),
        (["--baseline", "cosine", "--schedule", "a.json"], "give exactly one of"),
        (["--baseline", "cosine", "--greedy"], "give --controller, or leave them out"),
        (["--baseline", "cosine", "--sampled"], "give --controller, or leave them out"),
        (["--baseline", "cosine", "--scale", "0"], "--scale must be a finite number > 0, got 0"),
        (["--baseline", "cosine", "--scale", "-1"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "nan"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "inf"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "fast"], "--scale"),
        (["--baseline", "cosine", "--seed", "-1"], "--seed"),
    ],
)
def test_fit_refuses_wrong_arguments(fails, tmp_path, arguments, message):
    assert message in fails("fit", TASK, "--out", tmp_path / "model", *arguments)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.momentum_form=scaled-velocity", "`env.momentum_form` must be pytorch, as the sched"),
        ("env.lr_factor=warmup-poly", "`env.lr_factor` must be constant, as the schedule"),
        ("env.optimizer=adam", "`env.optimizer` must be sgd, as the schedule was learned with it"),
        ("env.speed=1", "`env.speed` is unknown"),
        ("env.instances=unknown-scale", "`env.instances` changes nothing in this command, got"),
        ("env.observation=asg", "`env.observation` changes nothing in this command, got"),
        ("train.workers=2", "--set must look like env.root=DIR here, got 'train.workers=2'"),
    ],
)
def test_fit_refuses_settings_that_a_schedule_was_not_learned_with(
    fails, schedule, tmp_path, override, message
):
    schedule.save(tmp_path / "s.json")
    arguments = ("--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    assert message in fails("fit", TASK, *arguments, "--set", override)


def test_fit_refuses_decisions_that_a_controller_was_not_trained_for(fails, run, tmp_path):
    arguments = ("--controller", run, "--out", tmp_path / "model", "--set", "env.action=grid")
    message = "`env.action` must be relative, as the controller was learned with it, got grid"
    assert message in fails("fit", TASK, *arguments)


def test_fit_refuses_to_stretch_a_common_factor(fails, schedule, tmp_path):
    settings = {**schedule.settings, "lr_factor": "warmup-poly"}
    schedule.with_changes(lr_factor="warmup-poly", settings=settings).save(tmp_path / "s.json")
    arguments = ("--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    message = fails("fit", TASK, *arguments, "--set", "env.inner_steps=4")
    assert "env.horizon times env.inner_steps must be 6, over which the schedule's warm" in message


def test_fit_says_that_a_schedule_is_squeezed(asg, schedule, tmp_path):
    schedule.with_changes(inner_steps=150).save(tmp_path / "s.json")
    result = asg("fit", TASK, "--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    assert "learned over 150 inner steps and is squeezed into 6" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "nowhere.json cannot be read as a schedule"),
        (["{s}", "--out", "{dir}/heat.pdf"], "--out must end in .png"),
        (["{s}", "--out", "{dir}/there.png"], "there.png exists; add --overwrite or choose"),
        (["{s}", "--out", "{dir}/none/heat.png"], "cannot be written (No such file"),
    ],
)
def test_show_refuses_what_it_cannot_do(fails, schedule, tmp_path, arguments, message):
    schedule.save(tmp_path / "s.json")
    (tmp_path / "there.png").touch()
    words = [word.format(s=tmp_path / "s.json", dir=tmp_path) for word in arguments]
    assert message in fails("show", *words)


def test_fit_stretches_a_schedule_over_another_length(asg, schedule, tmp_path):
    schedule.save(tmp_path / "s.json")
    arguments = ("--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    sets = ("--set", "env.inner_steps=4", "--set", "env.base_lr=0.001")
    assert asg("fit", TASK, *arguments, *sets).status == 0
    fitted = json.loads((tmp_path / "model" / "fit.json").read_text(encoding="utf-8"))
    assert [window["inner_step"] for window in fitted["windows"]] == [4, 8, 12]
    used = [tuple(window["lr_multipliers"]) for window in fitted["windows"]]
    assert tuple(used) == schedule.multipliers


def test_fit_refuses_an_unknown_task(fails, tmp_path):
    message = fails("fit", "ASG/None-v0", "--baseline", "cosine", "--out", tmp_path / "model")
    assert f"`task` must be one of {', '.join(TASK_MODULES)}, got 'ASG/None-v0'" in message


def test_fit_refuses_an_output_folder_in_use(fails, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "fit.json").write_text("{}", encoding="utf-8")
    message = fails("fit", TASK, "--baseline", "cosine", "--out", tmp_path / "model")
    assert "is not empty; add --overwrite or choose another --out" in message


def test_fit_refuses_an_output_below_a_file_before_it_trains(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(agents.cli.fit, "fit", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        out = tmp_path / "file" / "model"
        message = fails("fit", TASK, "--baseline", "cosine:0.1", "--out", out, *flags)
        assert "cannot be written" in message


def test_fit_and_export_refuse_a_training_seed_that_is_not_there(fails, run, inline, tmp_path):
    fit = ["fit", TASK, "--controller", run, "--out", tmp_path / "model"]
    export = ["export", run, "--out", tmp_path / "schedule.json"]
    for arguments in (fit, export):
        message = fails(*arguments, "--training-seed", "1")
        assert "--training-seed must be < 1, the training seeds of" in message
        assert ", got 1; lower it" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "0"], "--scale must be a finite number > 0, got 0"),
        (["--scale", "nan"], "--scale must be a finite number > 0, got nan"),
        (["--episodes", "0"], "--episodes"),
        (["--select", "worst"], "'worst' is not one of 'mean', 'median', 'best'"),
        (["--format", "yaml"], "'yaml' is not one of 'json', 'csv', 'python', 'contr"),
        (["--format", "csv"], "--out must end in .csv, got"),
    ],
)
def test_export_refuses_wrong_arguments(fails, run, tmp_path, arguments, message):
    assert message in fails("export", run, "--out", tmp_path / "schedule.json", *arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [("scale", "2.0"), ("episodes", "3"), ("select", "mean"), ("interpolation", "step")],
)
def test_export_refuses_options_of_schedules_for_a_controller(fails, run, tmp_path, option, value):
    message = fails("export", run, "--out", tmp_path / "c.onnx", f"--{option}", value)
    assert f"--{option} is of schedules and format onnx holds the controller itself" in message
    assert f"got {value}; leave it out" in message
    assert not (tmp_path / "c.onnx").exists()


def test_export_refuses_a_controller_that_is_not_there(fails, run, tmp_path):
    out = ("--out", tmp_path / "c.safetensors")
    message = fails("export", run, *out, "--training-seed", "1")
    assert "--training-seed must be < 1, the training seeds of" in message
    shutil.rmtree(run / "seed-0" / "checkpoints")
    assert "has no checkpoint of training seed 0" in fails("export", run, *out)


def test_export_refuses_what_a_snippet_cannot_hold_before_any_rollout(fails, run, tmp_path):
    arguments = ("--out", tmp_path / "s.py", "--interpolation", "linear")
    assert "--format python needs --interpolation step" in fails("export", run, *arguments)
    assert "--out must end in .json, .csv, .py" in fails("export", run, "--out", tmp_path / "s")


def test_export_refuses_what_it_cannot_write_before_any_rollout(fails, run, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "file" / "schedule.json", tmp_path / "none" / "a.json", tmp_path):
        assert "--out must be a file in an existing folder" in fails("export", run, "--out", out)
    message = fails("export", run, "--out", tmp_path / "file")
    assert "exists; add --overwrite or choose another --out" in message
    assert {p.name for p in tmp_path.iterdir()} == {"file", "run"}
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_export_leaves_nothing_when_the_disk_refuses(fails, run, inline, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asg_env.files.os.replace", full)
    message = fails("export", run, "--out", tmp_path / "schedule.json")
    assert "cannot be written (No space left on device)" in message
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


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
    assert "--instances must be one of fixed, unknown-scale, mixed, transfer, got many" in fails(
        "info", "--task", TASK, "--instances", "many"
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
