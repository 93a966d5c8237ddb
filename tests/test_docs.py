import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from agents.benchmark.plan import BenchmarkSettings
from agents.cli.main import main
from agents.compare.plan import RowSettings
from agents.evolution import EvolutionSettings
from agents.experiment import TrainSettings
from agents.numpy_policy import NumpyPolicy
from agents.reinforce import ReinforceSettings
from agents.rules import RULES
from agents.sequence_ppo import SequencePPOSettings
from asg_env.config import EnvSettings
from asg_env.core.guidance import TERMS
from asg_env.rewards import REWARD_TERMS
from asg_env.task_settings import DigitsSettings, ImageFolderSettings, VisDA17Settings

DOCS = Path(__file__).parents[1] / "docs"


def first_cells(page: str) -> set[str]:
    """What stands in code font in the first cell of any table row."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| ")]
    return {word for cell in cells for word in cell.split("`")[1::2]}


@pytest.mark.parametrize(
    ("page", "settings"),
    [
        ("environment.md", DigitsSettings),
        ("runs.md", ReinforceSettings),
        ("algorithms.md", SequencePPOSettings),
        ("algorithms.md", EvolutionSettings),
        ("benchmark.md", BenchmarkSettings),
        ("runs.md", TrainSettings),
    ],
)
def test_every_setting_stands_in_a_table(page, settings):
    assert set(settings.model_fields) - {"kind"} <= first_cells(page)


@pytest.mark.parametrize("settings", [VisDA17Settings, ImageFolderSettings])
def test_every_setting_of_ones_own_images_stands_in_a_table(settings):
    own = set(settings.model_fields) - set(EnvSettings.model_fields)
    assert own <= first_cells("real-data.md")


def test_every_reward_term_stands_in_the_table():
    listed = first_cells("environment.md")
    short = {"inner_valid_level", "inner_valid_terminal", "inner_valid_loss"}  # `_level`, ...
    assert set(REWARD_TERMS) - short <= listed
    assert {name.removeprefix("inner_valid") for name in short} <= listed


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for written_in, block in fenced if written_in == language]


def test_every_guidance_term_and_rule_stands_in_a_table():
    assert {*TERMS, *RULES} <= first_cells("guidance.md")
    assert {*RowSettings.model_fields} - {"share_rate"} <= first_cells("guidance.md")


def test_code_and_commands_of_the_guidance_page_run(tmp_path, monkeypatch, capsys):
    term, rule = blocks("guidance.md", "python")
    (rows,) = blocks("guidance.md", "yaml")
    (tmp_path / "sparse.py").write_text(term)
    (tmp_path / "halving.py").write_text(rule)
    (tmp_path / "mine.yaml").write_text(rows)
    monkeypatch.chdir(tmp_path)
    text = "".join(blocks("guidance.md", "")).replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("asg ")]
    commands = [words for words in lines if words[1] == "fit"]
    assert len(commands) == 4
    small = ["--set", "env.horizon=2", "--set", "env.inner_steps=2"]
    compare = ["compare", "ASG/Digits-v0", "--rows", "mine.yaml", "--seeds", "2", "--workers", "1"]
    commands.append(["asg", *compare, "--out", "mine", "--tuning-instances", "1"])
    for words in commands:
        monkeypatch.setattr("sys.argv", [*words, *small])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "model-sparse" / "fit.json").read_text())["windows"][-1]
    assert found["guidance"]["Sparse"] > 0
    assert (tmp_path / "mine" / "compare.md").exists()


def test_code_of_the_reuse_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("jax")
    examples = DOCS / "examples"
    for name in ("schedule.json", "controller.safetensors"):
        shutil.copy(examples / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    names = {
        "model": resnet18(num_classes=5),
        "total_steps": 150,
        "first_loss": 1.6,
        "inner_valid": lambda: 1.6,
        "batches": [(torch.rand(4, 3, 32, 32, generator=generator), torch.arange(4))]
        * 12,  # more than a window
        "observation": np.zeros(NumpyPolicy.load("controller.safetensors").width, np.float32),
    }
    for block in blocks("reuse.md", "python"):
        exec(compile(block, "reuse.md", "exec"), names)  # what a reader types
    assert names["controller"].multipliers.keys() == names["schedule"].layer_groups.keys()
    assert names["scheduler"].total_steps == 150
    assert names["choices"].shape == (5,)
    assert set(names["rates"]) == {"stem", "head", *names["schedule"].layer_groups}
    assert "layer4.1" in capsys.readouterr().out


def test_code_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    environment, reuse = blocks("../README.md", "python")
    names: dict = {}
    exec(compile(environment, "README.md", "exec"), names)
    assert len(names["info"]["lr_multipliers"]) == 5
    exec(compile(reuse, "README.md", "exec"), names)
    assert names["scheduler"].get_last_lr()[0] == 1.0 * 0.003
    capsys.readouterr()
    (pinned,) = blocks("environment.md", "python")
    exec(compile(pinned, "environment.md", "exec"), names)
    assert names["env"].unwrapped.instance == names["instance"]
