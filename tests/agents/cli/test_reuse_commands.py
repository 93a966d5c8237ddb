import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents.cli.fit_sources import start_of_record
from agents.controller_file import controller_of
from agents.numpy_policy import NumpyPolicy
from agents.recurrent_policy import RecurrentPolicy
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import load_task
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"


def test_export_writes_a_schedule_at_the_scale_asked_for(asg, done, inline, tmp_path):
    out = tmp_path / "mine.json"
    result = asg("export", done, "--out", out, "--scale", "0.5", "--episodes", "3")
    assert (result.status, result.err) == (0, "")
    schedule = LearnedSchedule.load(out)
    assert (schedule.base_lr_scale, schedule.episodes) == (0.5, 3)


@pytest.mark.parametrize(
    ("name", "options", "content"),
    [
        ("s.csv", [], "inner_step,progress,multiplier/conv1"),
        ("s.py", [], "return LambdaLR(optimizer, held)"),
        ("s.txt", ["--format", "python"], "return LambdaLR(optimizer, held)"),
        ("s.json", ["--select", "median"], '"selection": "median"'),
        ("s.json", ["--select", "best", "--sampled"], '"selection": "best"'),
        ("s.json", ["--interpolation", "log-linear"], '"interpolation": "log-linear"'),
    ],
)
def test_export_writes_what_is_asked_for(asg, done, inline, tmp_path, name, options, content):
    result = asg("export", done, "--out", tmp_path / name, "--episodes", "3", *options)
    assert (result.status, result.err) == (0, "")
    assert content in (tmp_path / name).read_text(encoding="utf-8")
    selection = options[1] if "--select" in options else "mean"
    assert f"multipliers at scale 1: {selection} of 3 rollouts" in result.out
    assert f"written: {tmp_path / name}" in result.out.replace("\n", "")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("c.safetensors", []),
        ("c.onnx", []),
        ("c.pt2", ["--sampled"]),
        ("c.bin", ["--format", "controller"]),
    ],
)
def test_export_writes_the_controller_itself(asg, done, tmp_path, name, options):
    result = asg("export", done, "--out", tmp_path / name, *options)
    assert (result.status, result.err) == (0, "")
    told = " ".join(result.out.split())
    assert "per-feature controller of ASG/Digits-v0, instances unknown-scale" in told
    assert ("sampled actions" if "--sampled" in options else "greedy actions") in told
    assert "for 5 layer groups: conv1, conv2, conv3, conv4, head; it observes 9 numbers" in told
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("c.")] == [name]
    if name in ("c.safetensors", "c.bin"):
        assert NumpyPolicy.load(tmp_path / name).width == 9


def test_export_writes_a_controller_for_layer_groups_of_other_names(asg, done, tmp_path):
    names = "stem, block1,block2,block3,head"
    result = asg("export", done, "--out", tmp_path / "c.pt2", "--layer-groups", names)
    assert (result.status, result.err) == (0, "")
    assert "for 5 layer groups: stem, block1, block2, block3, head" in " ".join(result.out.split())
    files = {"controller": ""}
    torch.export.load(tmp_path / "c.pt2", extra_files=files)
    record = json.loads(files["controller"])
    assert record["layer_groups"] == ["stem", "block1", "block2", "block3", "head"]


def test_show_prints_and_draws_a_schedule(asg, schedule, tmp_path):
    schedule.save(tmp_path / "mine.json")
    result = asg("show", tmp_path / "mine.json")
    assert (result.status, result.err) == (0, "")
    assert "6 inner steps of sgd at base rate 0.3" in result.out
    assert [line.split()[0] for line in result.out.splitlines()[2:7]] == [*schedule.layer_groups]
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert asg("show", tmp_path / "mine.json", "--out", tmp_path / "other.png").status == 0
    assert (tmp_path / "other.png").exists()
    (tmp_path / "mine.png").write_text("kept")
    again = asg("show", tmp_path / "mine.json")
    assert again.status == 0
    assert again.out.splitlines()[2:7] == result.out.splitlines()[2:7]
    assert "mine.png exists and stays" in " ".join(again.out.split())
    assert (tmp_path / "mine.png").read_text() == "kept"
    assert asg("show", tmp_path / "mine.json", "--overwrite").status == 0
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


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


def test_fit_does_with_a_controllers_file_what_it_does_with_its_run(asg, done, tmp_path):
    for options in (["--sampled"], ["--greedy"], []):
        exported = tmp_path / "c.safetensors"
        assert asg("export", done, "--out", exported, "--overwrite", *options).status == 0
        for name, path, flags in (("run", done, options), ("file", exported, [])):
            fit = ["fit", TASK, "--controller", path, "--out", tmp_path / name, "--overwrite"]
            assert asg(*fit, *flags).status == 0
        records = [fitted(tmp_path / name) for name in ("run", "file")]
        assert records[0]["windows"] == records[1]["windows"]
        assert records[0]["actions"] == records[1]["actions"]
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "file")]
        assert weights[0] == weights[1]


def test_controllers_file_leaves_another_task_its_rate_and_length(trained_run):
    record = controller_of(trained_run).record
    here, there = (start_of_record(record, task) for task in (TASK, "ASG/DigitsImageNet-v0"))
    assert here["observation"] == there["observation"] == "scaled"
    own = {"base_lr": record.base_lr, "horizon": 3, "inner_steps": 2}
    assert here == {**there, **own}
    growing = record.model_copy(update={"growing_windows": (1, 2, 3)})
    with pytest.raises(ConfigError, match="windows of \\[1, 2, 3\\] inner steps, which its file"):
        start_of_record(growing, TASK)


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


@pytest.mark.parametrize(
    "change", [{"lr_factor": "warmup-poly"}, {"momentum_form": "scaled-velocity"}]
)
def test_fit_goes_by_what_an_edited_schedule_says_of_itself(asg, schedule, tmp_path, change):
    weights = []
    for name, edited in (("as-it-was", schedule), ("edited", schedule.with_changes(**change))):
        edited.save(tmp_path / f"{name}.json")
        out = tmp_path / name
        assert asg("fit", TASK, "--schedule", tmp_path / f"{name}.json", "--out", out).status == 0
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


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
