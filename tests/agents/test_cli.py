import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import agents.cli
import agents.cli_fit
import agents.cli_info
from agents.baselines import FAMILIES
from agents.experiment import Experiment
from agents.recurrent_policy import RecurrentPolicy
from agents.run_folder import RunFolder
from agents.train import train
from asg_env.core.numerics import NotRepeatableError
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import TASK_MODULES, load_task
from asg_env.validation import ConfigError

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
    monkeypatch.setattr(agents.cli, "estimate_minutes", lambda *_: minutes)


@pytest.fixture
def inline(monkeypatch, inline_pool, no_workers, no_estimate):
    """Everything runs in this process."""
    monkeypatch.setattr("agents.evaluate.RolloutPool", inline_pool)
    monkeypatch.setattr("agents.cli.RolloutPool", inline_pool)


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


def test_train_refuses_a_folder_that_holds_a_run(fails, write, run, no_estimate):
    assert "already holds a run; add --resume" in fails("train", write(), "--out", run)


def test_train_refuses_a_folder_that_is_not_empty(fails, write, no_estimate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine", encoding="utf-8")
    message = fails("train", write(), "--out", tmp_path / "out")
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
        ({"base_lr": -1}, "`base_lr` must be a finite number > 0"),
        ({"settings": {"horizon": 0}}, "`schedule.settings.horizon` must be >= 1, got 0"),
        ({"settings": {"speed": 1}}, "`schedule.settings.speed` is unknown"),
        ({"settings": {"device": "abacus"}}, "`device` must be a torch device"),
        ({"settings": 3}, "schedule `settings` must be a mapping, got 3"),
        ({"layer_groups": ["conv1"]}, "`layer_groups` must map names to patterns"),
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
    monkeypatch.setattr(agents.cli_fit, "fit", lambda *_: pytest.fail("it trained"))
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
    ],
)
def test_export_refuses_wrong_arguments(fails, run, tmp_path, arguments, message):
    assert message in fails("export", run, "--out", tmp_path / "schedule.json", *arguments)


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

    monkeypatch.setattr("asg_env.schedule.os.replace", full)
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
        agents.cli.main()


def test_main_does_not_hide_our_own_errors(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(agents.cli_info, "provenance", broken)
    monkeypatch.setattr(sys, "argv", ["asg", "info"])
    with pytest.raises(RuntimeError, match="a bug"):
        agents.cli.main()


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

    monkeypatch.setattr(agents.cli_info, "provenance", full)
    assert message in fails("info")


def test_mistake_in_a_real_process_gives_status_2_and_one_line(write, tmp_path):
    path = write(env={"horizon": 0})
    result = subprocess.run(
        [sys.executable, "-m", "agents.cli", "train", str(path), "--out", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("asg: `env.horizon` must be >= 1, got 0")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["estimate_minutes", "train", "_evaluate", "_export"])
def test_interrupt_ends_with_130_and_says_how_to_go_on(
    asg, write, no_estimate, tmp_path, monkeypatch, stage
):
    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("train", "_evaluate", "_export"):
        monkeypatch.setattr(agents.cli, name, lambda *_: None)
    monkeypatch.setattr(agents.cli, stage, interrupted)
    path, out = write(), tmp_path / "run"
    result = asg("train", path, "--out", out, "--set", "seed=5", "--set", "env.reward={gain: 1}")
    assert result.status == 130
    resume = f"asg train {path} --out {out} --resume --set seed=5 --set 'env.reward={{gain: 1}}'"
    assert resume in result.out
    assert "Traceback" not in result.out + result.err


# What works


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_values) -> Path:
    """`asg train`, with real worker processes, from an experiment file to figures."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(make_values()), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["asg", "train", str(path), "--out", str(folder / "run")])
        with pytest.raises(SystemExit) as stop:
            agents.cli.main()
    assert stop.value.code == 0
    return folder / "run"


@pytest.fixture
def done(finished, tmp_path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(finished, tmp_path / "done")
    return tmp_path / "done"


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


def test_export_writes_a_schedule_at_the_scale_asked_for(asg, done, inline, tmp_path):
    out = tmp_path / "mine.json"
    result = asg("export", done, "--out", out, "--scale", "0.5", "--episodes", "3")
    assert (result.status, result.err) == (0, "")
    schedule = LearnedSchedule.load(out)
    assert (schedule.base_lr_scale, schedule.episodes) == (0.5, 3)


def test_export_repeats_the_schedule_of_training(asg, done, inline, tmp_path):
    assert asg("export", done, "--out", tmp_path / "again.json").status == 0
    assert (tmp_path / "again.json").read_bytes() == (done / "schedule.json").read_bytes()


@pytest.mark.parametrize("greedy", [True, False])
def test_export_and_fit_act_as_the_comparison_chose(
    asg, done, inline, tmp_path, monkeypatch, greedy
):
    record = json.loads((done / "results.json").read_text(encoding="utf-8"))
    record["protocol"]["primary"] = f"controller ({'greedy' if greedy else 'sampled'})"
    (done / "results.json").write_text(json.dumps(record), encoding="utf-8")
    asked = []
    predict = RecurrentPolicy.predict

    def spy(self, *arguments, deterministic):
        asked.append(deterministic)
        return predict(self, *arguments, deterministic=deterministic)

    monkeypatch.setattr(RecurrentPolicy, "predict", spy)
    fit = ["fit", TASK, "--controller", done, "--out"]
    assert asg(*fit, tmp_path / "a").status == 0
    assert asg("export", done, "--out", tmp_path / "schedule.json", "--episodes", "1").status == 0
    assert asked == [greedy] * 6
    fitted_as = json.loads((tmp_path / "a" / "fit.json").read_text(encoding="utf-8"))["actions"]
    exported = LearnedSchedule.load(tmp_path / "schedule.json").provenance["actions"]
    assert fitted_as == exported == ("greedy" if greedy else "sampled")
    asked.clear()
    assert asg(*fit, tmp_path / "b", "--sampled" if greedy else "--greedy").status == 0
    assert asked == [not greedy] * 3


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


def fitted(out: Path) -> dict:
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "fit.json"}
    network = load_task(TASK).optimizee
    network.load_state_dict(load_file(str(out / "model.safetensors")))
    record = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert 0 <= record["test_accuracy"] <= 1
    return record


@pytest.mark.parametrize("source", ["schedule", "controller"])
def test_fit_trains_with_what_was_learned(asg, done, tmp_path, source):
    path = done / "schedule.json" if source == "schedule" else done
    out = tmp_path / "model"
    result = asg("fit", TASK, f"--{source}", path, "--out", out)
    assert (result.status, result.err) == (0, "")
    record = fitted(out)
    assert record["source"] == str(path)
    assert [window["inner_step"] for window in record["windows"]] == [2, 4, 6]
    if source == "schedule":
        learned = LearnedSchedule.load(path)
        used = [window["lr_multipliers"] for window in record["windows"]]
        np.testing.assert_array_equal(used, learned.multipliers)
    first = (out / "model.safetensors").read_bytes()
    assert asg("fit", TASK, f"--{source}", path, "--out", out, "--overwrite").status == 0
    assert (out / "model.safetensors").read_bytes() == first
    again = asg("fit", TASK, f"--{source}", path, "--out", out, "--overwrite", "--seed", "1")
    assert again.status == 0
    assert (out / "model.safetensors").read_bytes() != first


def test_fit_trains_with_a_baseline(asg, tmp_path):
    out = tmp_path / "model"
    assert asg("fit", TASK, "--baseline", "cosine:0.1", "--out", out).status == 0
    record = fitted(out)
    assert record["source"] == "baseline cosine:0.1"
    assert record["windows"][0]["lr_multipliers"] == [0.1] * 5
    assert record["test_accuracy"] > 0.4


def test_fit_names_the_candidate_it_takes_when_none_is_given(asg, tmp_path):
    result = asg("fit", TASK, "--baseline", "uniform", "--out", tmp_path / "model")
    assert result.status == 0
    assert "taking 0.03" in " ".join(result.out.split())


def test_fit_reports_a_diverged_training_in_valid_json(asg, schedule, tmp_path):
    path = tmp_path / "schedule.json"
    schedule.save(path)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["base_lr"] = 1e25
    path.write_text(json.dumps(record), encoding="utf-8")
    result = asg("fit", TASK, "--schedule", path, "--out", tmp_path / "model")
    assert result.status == 0
    assert "diverged" in result.out
    text = (tmp_path / "model" / "fit.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["test_accuracy"] == 0
    assert record["windows"][-1]["diverged"] is True


def test_fit_without_an_old_task_says_so(asg, image_folders, tmp_path):
    source, target = image_folders
    values = {"source": source, "target": target, "backbone": "torchvision:resnet18"}
    values |= {"weights": "random", "image_size": 32, "batch_size": 4, "horizon": 1}
    values |= {"inner_steps": 1, "outer_valid_fraction": 0, "reward": "train_loss"}
    sets = [part for key, value in values.items() for part in ("--set", f"env.{key}={value}")]
    out = tmp_path / "fit"

    result = asg("fit", "ASG/ImageFolder-v0", "--baseline", "uniform", "--out", out, *sets)

    assert result.status == 0, result.err
    assert ", no old task to retain\n" in result.out
    assert json.loads((out / "fit.json").read_text())["retention"] is None
