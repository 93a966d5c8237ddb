"""docs/real-data.md: every command, on miniature trees with the layout of the real ones."""

import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torchvision
from safetensors.torch import save_file

import agents.evaluate
from agents.baselines import FAMILIES
from agents.experiment import load_experiment

PAGE = Path(__file__).parents[1] / "docs" / "real-data.md"
# What makes a miniature of a GPU's work; the commands are otherwise those of the page.
SMALL_ENV = {
    "backbone": "torchvision:resnet18",
    "weights": "random",
    "image_size": 32,
    "device": "cpu",
    "precision": "float32",
    "horizon": 2,
    "inner_steps": 2,
    "batch_size": 4,
    "outer_valid_size": 4,
    "augmentation": "none",
}
SMALL_RUN = {
    "agent.updates": 1,
    "agent.instances_per_update": 1,
    "agent.rollouts_per_instance": 2,
    "train.workers": 1,
    "train.test_instances": 2,
    "train.tuning_instances": 1,
    "train.search_episodes": 0,
}


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words[:1] == ["asg"] or "asg_env.tasks.miniature" in words]


def smaller(words):
    """The command with small settings; those that it sets itself stand last and win."""
    own = words[words.index("--set") :] if "--set" in words else []
    kept = words[: len(words) - len(own)]
    env = [f"env.{key}={value}" for key, value in SMALL_ENV.items()]
    run = [f"{key}={value}" for key, value in SMALL_RUN.items()]
    match words[1]:
        case "prepare":
            return [*words, "--image-size", "32", "--workers", "1"]
        case "evaluate":
            return [*words[:3], "--instances", "1", "--workers", "1"]
        case "export":
            return [*words, "--episodes", "2"]
        case "train":
            sets = env + run
        case "info":
            sets = env
        case "fit":
            sets = [] if "--controller" in words else ["env.inner_steps=3"]
    own = [word for word in own if "device=cuda" not in word and "9526" not in word]
    own = [
        w for i, w in enumerate(own) if w != "--set" or own[i + 1 : i + 2] not in ([], ["--set"])
    ]
    return [*kept, *(word for value in sets for word in ("--set", value)), *own]


@pytest.fixture
def run(monkeypatch, capsys):
    from agents.cli.main import main

    def run(words):
        monkeypatch.setattr(sys, "argv", words)
        if words[0] == "python":
            fewer = ["5" if word == "20" else word for word in words[2:]]
            monkeypatch.setattr(sys, "argv", fewer)
            runpy.run_module(words[2], run_name="__main__")
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 0, f"{shlex.join(words)}: {captured.err}"
        return captured.out

    return run


def rows_of_the_table():
    """What each row of section 4's table has one add, in words of the shell."""
    rows = re.findall(r"^\| [^|]+ \| `(--set .*?)`", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return [shlex.split(row.replace(r"\|", "|")) for row in rows]


def test_the_table_of_settings_has_its_rows():
    assert len(rows_of_the_table()) == 7


@pytest.mark.parametrize("added", rows_of_the_table(), ids=" ".join)
def test_rows_of_the_table_are_accepted(added, run, visda_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assignments = added[1::2]
    experiment = load_experiment("visda17", [f"env.root={visda_root}", *assignments])
    if assignments == ["train.workers=4"]:
        assert experiment.train.workers == 4
        return
    small = {"root": visda_root, "image_size": 32}
    if not any(a.startswith("env.weights=") for a in assignments):
        assert experiment.env.weights == "pretrained"  # there for every network, unlike an entry
        small["weights"] = "random"
    else:
        state = torchvision.models.resnet18().state_dict()
        save_file(state, tmp_path / "resnet101.safetensors")
    if not any(a.startswith("env.backbone=") for a in assignments):
        small["backbone"] = "torchvision:resnet18"
    sets = [word for key, value in small.items() for word in ("--set", f"env.{key}={value}")]
    task = json.loads(run(["asg", "info", "--task", "ASG/VisDA17-v0", *sets, *added]))["task"]
    assert task["splits"]["train"] == 48


@pytest.mark.slow
def test_every_command_of_the_page_works_on_miniature_trees(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One family of baselines, and one instance on which to choose greedy or sampled actions, are
    # enough to see a comparison work.
    monkeypatch.setattr(agents.evaluate, "FAMILIES", {"uniform": FAMILIES["uniform"]})
    monkeypatch.setattr(agents.evaluate, "MODE_INSTANCES", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "stores").mkdir()
    seen = []
    for words in commands():
        small = words if words[0] == "python" else smaller(words)
        seen.append((words[1], run(small)))

    kinds = [kind for kind, _ in seen]
    for kind, times in {"prepare": 2, "train": 3, "evaluate": 2, "export": 3, "fit": 3}.items():
        assert kinds.count(kind) == times, kind
    infos = [json.loads(out)["task"] for kind, out in seen if kind == "info"]
    assert infos[0]["storage"].startswith("the memory-mapped store")
    assert infos[2]["splits"].keys() == {"train", "test"}
    for run_folder in ("visda17", "own"):
        summary = json.loads((tmp_path / "runs" / run_folder / "results.json").read_text())
        assert summary["protocol"]["metric"] == (
            "mean_recall" if run_folder == "visda17" else "accuracy"
        )
        assert all({"overall_accuracy", "mean_recall"} <= set(row) for row in summary["rows"])
        fit = json.loads((tmp_path / "models" / run_folder / "fit.json").read_text())
        assert 0 <= fit["test_mean_recall"] <= 1
    assert not (tmp_path / "runs" / "blind" / "results.json").exists()
    assert os.path.getsize(tmp_path / "models" / "own-live" / "model.safetensors") > 1e6
