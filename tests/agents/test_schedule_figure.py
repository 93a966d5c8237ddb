import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from agents.schedule_figure import COLUMNS, draw_schedule, heat_map, over_time
from asg_env.schedule import LearnedSchedule


@pytest.fixture
def learned() -> LearnedSchedule:
    return LearnedSchedule(
        layer_groups={"conv": r"0\.", "head": r"1\."},
        knots=(0.0, 0.5),
        multipliers=((1.0, 0.0), (0.001, 0.1)),
        spread=((0.0, 0.0),) * 2,
        base_lr=0.3,
        optimizer="sgd",
        momentum_form="pytorch",
        lr_factor="constant",
        episodes=16,
        task="ASG/Digits-v0",
        instances="fixed",
        base_lr_scale=1.0,
        inner_steps=8,
        settings={},
    )


def shown(text, **settings) -> str:
    console = Console(width=100, **settings)
    with console.capture() as capture:
        console.print(text)
    return capture.get()


def test_heat_map_without_colour_says_it_by_the_density_of_letters(learned):
    lines = shown(heat_map(learned, 100), color_system=None).splitlines()
    half = COLUMNS[1] // 2
    assert lines[0] == f"conv {'@' * half}{' ' * half} 1, 1, 0.001"
    assert lines[1].startswith(f"head {' ' * half}")
    assert lines[1].endswith(" 0, 0.1, 0.1")
    assert len(set(lines[1][5 + half : 5 + 2 * half])) == 1
    assert [float(number) for number in re.findall(r"[\d.]*\d", lines[3])] == pytest.approx(
        [0.001, 0.0032, 0.01, 0.032, 0.1, 0.32, 1]
    )


def test_heat_map_in_colour_goes_from_dark_to_bright(learned):
    text = shown(heat_map(learned, 100), force_terminal=True, color_system="truecolor")
    colours = re.findall(r"48;2;(\d+);(\d+);(\d+)m", text.splitlines()[0])
    first, last = (np.array(colours[i], int) for i in (0, -1))
    assert first.sum() > 350 > 200 > last.sum()


@pytest.mark.parametrize("width", [50, 80])
def test_heat_map_fits_into_the_terminal(learned, width):
    lines = heat_map(learned, width).plain.splitlines()
    assert max(map(len, lines[:3])) == width
    assert max(map(len, heat_map(learned, 10).plain.splitlines()[:3])) > 20  # and is not too small


def test_the_training_is_read_in_equal_parts(learned):
    np.testing.assert_array_equal(over_time(learned, 4), [[1, 1, 0.001, 0.001], [0, 0, 0.1, 0.1]])


def test_the_picture_is_bright_where_multipliers_are_large(learned, tmp_path):
    draw_schedule(learned, tmp_path / "schedule.png")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]
    pixels = np.asarray(Image.open(tmp_path / "schedule.png").convert("RGB"), int)
    height, width = pixels.shape[:2]
    row = pixels[height // 4]  # through the upper group
    left, right = row[width // 3].sum(), row[2 * width // 3].sum()
    assert left > right + 150
