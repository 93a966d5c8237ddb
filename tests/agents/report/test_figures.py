import dataclasses
import json
import re

import numpy as np
import pytest

from agents import protocol
from agents.evaluate import Row
from agents.records import EPISODES, write_episodes
from agents.report.controllers import split_by_kind
from agents.report.document import report_html
from agents.report.figures import behaviour, common_limits, draw_behaviour, draw_learning
from agents.report.page import Names, number
from agents.report.svg import inline_svg, page_style
from asg_env.validation import ConfigError


def test_episodes_are_kept_of_controllers_and_the_static_search(make_episode, tmp_path):
    episode = make_episode([0.1] * 3, accuracy=[0.2, 0.3, 0.4], diverged=True)
    episode = dataclasses.replace(episode, ce=np.array([1.0, 2.0, np.inf]))
    result = protocol.TestResult(episode, np.array([True, False]), recall=0.5, retention=None)
    names = ("controller (greedy)", "static search", "uniform")
    write_episodes([Row(name, "", [[result]]) for name in names], ["head"], tmp_path)
    values = json.loads((tmp_path / EPISODES).read_text(), parse_constant=pytest.fail)
    assert [row["name"] for row in values["rows"]] == list(names[:2])
    assert values["layer_groups"] == ["head"]
    ((record,),) = values["rows"][0]["results"]
    assert record["ce"] == [1.0, 2.0, None]
    assert record["outer_valid"] == [0.2, 0.3, 0.4]
    assert (record["accuracy"], record["diverged"]) == (0.5, True)


def episode(scale=1.0, multiplier=0.1, steps=2, of=2, **changes):
    return {
        "instance": {"base_lr_scale": scale},
        "multipliers": [[multiplier, 0.0]] * steps,
        "progress": (np.arange(steps + 1) / of).tolist(),
        "ce": [1.0] * steps,
        "outer_valid": [0.5] * steps,
        "diverged": False,
        **changes,
    }


def test_behaviour_averages_logarithms_and_counts_divergence():
    left = episode(multiplier=0.01)
    lost = episode(multiplier=1.0, steps=1, diverged=True, ce=[None])
    shown = behaviour([left, left, lost])
    np.testing.assert_allclose(shown.log_multipliers, [[-4 / 3, -3], [-2, -3]])
    np.testing.assert_allclose(shown.ce.median, [1, 1])
    np.testing.assert_allclose(shown.accuracy.median, [0.5, 0.5])
    np.testing.assert_allclose(shown.accuracy.low, [0.5, 0.25])  # a diverged run scores 0
    assert (shown.runs, shown.diverged) == (3, pytest.approx(1 / 3))


def test_behaviour_puts_horizons_on_common_windows_and_thins_out_many():
    shown = behaviour([episode(steps=4, of=4), episode(multiplier=1.0)])
    assert shown.log_multipliers.shape == (4, 2)
    np.testing.assert_allclose(shown.log_multipliers[:, 0], -0.5)
    assert behaviour([episode(steps=500, of=500)]).log_multipliers.shape == (40, 2)


def test_behaviour_of_runs_that_all_diverged_is_drawn():
    lost = episode(steps=1, diverged=True, ce=[None])
    shown = behaviour([lost, lost])
    figure = draw_behaviour(shown, "agent", ["a", "head"], common_limits([shown]))
    with page_style():
        assert "nan" not in inline_svg(figure, "f", "all diverged").lower()


def test_heat_map_needs_a_name_for_each_group():
    shown = behaviour([episode()])
    with pytest.raises(ValueError, match="must be 2 names, got 1"):
        draw_behaviour(shown, "agent", ["a"], common_limits([shown]))
    with pytest.raises(ValueError, match="no episode"):
        behaviour([])


def test_instances_are_split_by_scale_and_by_optimizer():
    assert list(split_by_kind([episode()], "sgd")) == ["hidden scale 1"]
    three = [episode(scale) for scale in (0.1, 1.0, 10.0, 9.0)]
    assert [len(found) for found in split_by_kind(three, "sgd").values()] == [1, 1, 2]
    three[0]["instance"]["optimizer"] = "adam"
    assert list(split_by_kind(three, "sgd")) == [
        "low hidden scale (below 0.46), adam",
        "middle hidden scale (0.46 to 2.15), sgd",
        "high hidden scale (above 2.15), sgd",
    ]


def test_one_figure_twice_has_ids_of_its_own():
    with page_style():
        figure = draw_learning({"seed 0": (np.arange(3), np.array([0, np.nan, 1]))}, "return")
        first, second = (inline_svg(figure, name, "a < b") for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first.replace("one-", "two-") == second
    assert '<title id="one-title">a &lt; b</title>' in first
    assert "font-family" not in first


def test_learning_curves_need_a_curve():
    with pytest.raises(ValueError, match="no curve"):
        draw_learning({}, "return")


def test_names_are_given_once():
    names = Names("top")
    given = [names.give(text) for text in ("Top", "a b", "A  b!", "a-b-2", "§")]
    assert given == ["top-2", "a-b", "a-b-2", "a-b-2-2", "part"]


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_a_number_that_is_missing_is_a_dash(value):
    assert number(value) == "–"


def test_mistakes_are_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        report_html(tmp_path)
