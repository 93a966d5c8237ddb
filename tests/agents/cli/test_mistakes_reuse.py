import json
import shutil

import pytest

import agents.cli.fit
import agents.cli.info
import agents.cli.main
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import TASK_MODULES

TASK = "ASG/Digits-v0"


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
        ({"optimizer": "magic"}, "`schedule.optimizer` must be one of 'sgd'"),
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
        (
            ["--baseline", "cosine", "--scale", "0"],
            "--scale must be a finite number > 0, at most 10000, got 0",
        ),
        (["--baseline", "cosine", "--scale", "-1"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "nan"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "inf"], "--scale must be a finite number > 0"),
        (["--baseline", "cosine", "--scale", "1e300"], "at most 10000, got 1e+300; set it so"),
        (["--baseline", "cosine", "--scale", "fast"], "--scale"),
        (["--baseline", "cosine", "--set", "env.base_lr=1e300"], "`env.base_lr` must be <= 1e+25"),
        (["--controller", "nowhere"], "--controller nowhere is not there; give a run folder or"),
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
        ("train.workers=2", "--set must look like env.batch_size=16 here, got 'train.workers=2'"),
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


def test_fit_refuses_a_file_that_is_no_controller_for_it(asg, fails, schedule, run, tmp_path):
    arguments = ("fit", TASK, "--out", tmp_path / "model", "--controller")
    schedule.save(tmp_path / "s.json")
    assert "s.json cannot be read as a controller (" in fails(*arguments, tmp_path / "s.json")
    assert asg("export", run, "--out", tmp_path / "c.safetensors").status == 0
    message = fails(*arguments, tmp_path / "c.safetensors", "--training-seed", "1")
    assert "--training-seed chooses in a run folder, while " in message
    message = fails("fit", "ASG/DigitsImageNet-v0", *arguments[2:], run)
    assert f"{run} was trained on {TASK}, got ASG/DigitsImageNet-v0; export its cont" in message


def test_fit_refuses_a_schedule_of_another_task(fails, schedule, tmp_path):
    schedule.save(tmp_path / "s.json")
    arguments = ("--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    message = fails("fit", "ASG/DigitsImageNet-v0", *arguments)
    assert f"s.json was learned on {TASK}, got ASG/DigitsImageNet-v0; fit that task, or" in message


def test_fit_runs_no_file_that_a_schedule_names(asg, fails, schedule, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit('run')")
    settings = {**schedule.settings, "guidance": {f"{mine}:Term": 0.1}}
    schedule.with_changes(settings=settings).save(tmp_path / "s.json")
    arguments = (TASK, "--schedule", tmp_path / "s.json", "--out", tmp_path / "model")
    message = fails("fit", *arguments)
    assert f"the term {mine}:Term, and no file is run because a schedule names it" in message
    assert asg("fit", *arguments, "--set", "env.kl_weight=0.1").status == 0


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
        (["--scale", "0"], "--scale must be a finite number > 0, at most 10000, got 0"),
        (["--scale", "nan"], "--scale must be a finite number > 0, at most 10000, got nan"),
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


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("s.json", "a,b", "--layer-groups is of the formats onnx and torch, while a schedule is"),
        ("c.safetensors", "a,b", "got format controller; leave it out"),
        ("c.pt2", "a,b", "the controller is for 5 layer groups (conv1, conv2, conv3, conv4, head)"),
        (
            "c.onnx",
            "a,,b",
            "layer groups must be different names, none empty, got ['a', '', 'b']; name each",
        ),
    ],
)
def test_export_refuses_layer_groups_that_it_cannot_write_for(
    fails, run, tmp_path, name, groups, message
):
    found = fails("export", run, "--out", tmp_path / name, "--layer-groups", groups)
    assert message in found
    assert not (tmp_path / name).exists()


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
