import json

import pytest

from agents.compare.work import TrialRunner
from agents.rollout import WorkerPool
from asg_env.core.optimizers import OneRateError
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"


def silent(row, done):
    pass


def plain(value):
    """What JSON makes of a value."""
    return json.loads(json.dumps(value))


def own_rows(user_code):
    """Rows that say in the user's words what the built-in ones say; factors are powers of two."""
    return (
        [
            {
                "name": "a",
                "rule": f"{user_code}:Share",
                "options": {"share": 0.5},
                "rate": 0.2,
                "guidance": {f"{user_code}:Anchor": {"weight": 1, "factor": 2.0}},
                "tune": {f"{user_code}:Anchor": [0.25, 32]},
            }
        ],
        [{"name": "a", "rate": 0.1, "tune": {"weight_l2": [0.5, 64]}}],
    )


def test_comparison_of_ones_own_term_and_rule_equals_that_of_the_built_in_ones(
    make_plan, make_comparison, trial_pool, without_seconds, user_code, tmp_path
):
    mine, built_in = (
        without_seconds(
            make_comparison(make_plan(rows), tmp_path / name).run(trial_pool(), silent)
        )[0]
        for name, rows in zip(("mine", "built-in"), own_rows(user_code), strict=True)
    )
    assert mine["results"] == built_in["results"]
    assert list(mine["tuning"].values()) == list(built_in["tuning"].values())
    assert list(mine["guidance"]) == ["Anchor"]
    assert mine["results"][0][0]["drifts"] != built_in["results"][0][1]["drifts"]


def test_comparison_in_a_worker_process_gives_the_same_rows(
    make_plan, make_comparison, trial_pool, without_seconds, user_code, tmp_path
):
    plan = make_plan(own_rows(user_code)[0])
    here = make_comparison(plan, tmp_path / "here").run(trial_pool(), silent)
    with WorkerPool(1, TrialRunner, (TASK, 1)) as pool:
        there = make_comparison(plan, tmp_path / "there").run(pool, silent)
    assert without_seconds(there) == without_seconds(here)


def test_comparison_refuses_prodigy_with_a_rate_for_each_group(
    make_plan, make_comparison, trial_pool, tmp_path
):
    rows = [
        {
            "name": "a",
            "rule": "small-backbone",
            "rate": 1,
            "env": {"optimizer": "prodigy", "base_lr": 1},
        }
    ]
    with pytest.raises(OneRateError, match="prodigy takes one rate for all layer groups, or 0"):
        make_comparison(make_plan(rows), tmp_path).run(trial_pool(), silent)


def test_comparison_does_not_take_over_rows_made_with_another_text_of_a_users_file(
    make_plan, make_comparison, trial_pool, tmp_path
):
    file = tmp_path / "mine.py"
    text = "from agents.baselines import Cosine\n\ndef rule(groups, top):\n    return Cosine(top)\n"
    file.write_text(text, encoding="utf-8")
    rows = [{"name": "a", "rule": f"{file}:rule", "rate": 0.1}]
    make_comparison(make_plan(rows), tmp_path).run(trial_pool(), silent)
    file.write_text(text + "# another text\n", encoding="utf-8")

    with pytest.raises(ConfigError, match="is a row of other settings"):
        make_comparison(make_plan(rows), tmp_path).run(trial_pool(), silent)
