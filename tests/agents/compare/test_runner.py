import json
import math

import pytest

from agents.baselines import uniform
from agents.compare.plan import Method
from agents.compare.work import TrialRunner, train_once, tuning_trial
from agents.compare.work import test_trial as run_test_trial  # not a test of its own
from agents.fit import fit
from agents.rules import LEVELS, PilotSearch
from agents.search import train_instances
from asg_env.build import build_trainer
from asg_env.core.guidance import TERMS, Weighted
from asg_env.instances import published_test_instances

TASK = "ASG/Digits-v0"
TRAIN_INSTANCE = train_instances(TASK, "fixed", seed=0, count=1)[0]
TEST_INSTANCE = published_test_instances(TASK, "fixed")[0]


@pytest.fixture
def runner():
    return TrialRunner(TASK, 1)


@pytest.fixture
def make_method(make_settings):
    def make(rule="uniform", rate=0.1, options=None, **env):
        return Method(make_settings(**env), rule, rate, options or {})

    return make


def test_runner_keeps_its_trainer_while_only_guidance_changes(runner, make_settings):
    trainer = runner.trainer_for(make_settings(kl_weight=0.5))
    assert trainer.guidance.weighted == {"kl": Weighted(TERMS["kl"], 0.5)}
    assert runner.trainer_for(make_settings(guidance={"weight_l2": 2})) is trainer
    assert trainer.guidance.weighted == {"weight_l2": Weighted(TERMS["weight_l2"], 2.0)}
    assert runner.trainer_for(make_settings(guidance={})) is trainer
    assert trainer.guidance.weighted == {}
    other = runner.trainer_for(make_settings(base_lr=0.2))
    assert other is not trainer
    assert other.settings.base_lr == 0.2
    assert other.guidance.weighted == {"kl": Weighted(TERMS["kl"], 0.1)}


def test_trial_does_not_depend_on_what_the_worker_did_before(runner, make_method):
    method = make_method(guidance={"weight_l2": 0.5})
    fresh = run_test_trial(TrialRunner(TASK, 1), method, TEST_INSTANCE, 0)
    for before in (
        make_method(guidance={"kl": 5}, rate=0.3),
        make_method(optimizer="adam", base_lr=0.01),
        make_method(base_lr=1e25),
    ):
        tuning_trial(runner, before, TRAIN_INSTANCE, "outer_valid", "accuracy")
        result = run_test_trial(runner, method, TEST_INSTANCE, 0)
        assert {**result, "seconds": 0} == {**fresh, "seconds": 0}


def test_runner_tells_terms_of_the_same_name_in_two_files_apart(runner, make_method, tmp_path):
    text = (
        "class Mine:\n"
        "    def __init__(self, pretrained):\n        pass\n"
        "    def __call__(self, step):\n        return step.kl.new_tensor({})\n"
    )
    seen = []
    for number in (1.0, 2.0):
        path = tmp_path / f"term{number:.0f}.py"
        path.write_text(text.format(number), encoding="utf-8")
        method = make_method(guidance={f"{path}:Mine": 1.0})
        trainer = runner.trainer_for(method.settings)
        records = fit(trainer, uniform(0.1, 5), TRAIN_INSTANCE, method.settings.windows())
        seen.append(records[-1]["guidance"]["Mine"])
    assert seen == [1.0, 2.0]


def test_training_counts_the_inner_steps_of_pilot_runs(runner, make_method):
    method = make_method("pilot-search", options={"steps": 2})
    trainer, training = train_once(runner, method, TEST_INSTANCE, 0)
    assert training.inner_steps == 6 + 2 * len(LEVELS)
    result = trainer.evaluate("test")
    again = build_trainer(TASK, method.settings)
    fit(again, PilotSearch(2), TEST_INSTANCE, method.settings.windows())
    assert result.correct.tolist() == again.evaluate("test").correct.tolist()


def test_diverged_training_scores_nothing_and_stays_valid_json(runner, make_method):
    method = make_method(base_lr=1e25)
    assert tuning_trial(runner, method, TRAIN_INSTANCE, "outer_valid", "accuracy") == 0.0
    result = run_test_trial(runner, method, TEST_INSTANCE, 0)
    assert result["diverged"] is True
    assert set(result["correct"]) == {"0"}
    assert len(result["correct"]) == 1500
    assert (result["retention"], result["energies"], result["calibration_error"]) == (0, None, None)
    assert None in result["drifts"]
    json.dumps(result, allow_nan=False)
    assert all(d is None or math.isfinite(d) for d in result["drifts"])
