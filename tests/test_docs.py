from pathlib import Path

import pytest

from agents.experiment import TrainSettings
from agents.reinforce import ReinforceSettings
from asg_env.config import EnvSettings
from asg_env.rewards import REWARD_TERMS
from asg_env.task_settings import ImageFolderSettings, VisDA17Settings

DOCS = Path(__file__).parents[1] / "docs"


def first_cells(page: str) -> set[str]:
    """What stands in code font in the first cell of any table row."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| ")]
    return {word for cell in cells for word in cell.split("`")[1::2]}


@pytest.mark.parametrize(
    ("page", "settings"),
    [
        ("environment.md", EnvSettings),
        ("runs.md", ReinforceSettings),
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
