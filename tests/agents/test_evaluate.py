import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import agents
import asg_env
from agents import evaluate, judgement, protocol
from agents.baselines import FAMILIES, KnownScale, Static
from agents.evaluate import Evaluation, Row
from agents.policy import RandomPolicy
from agents.protocol import acts_greedily, judge_controller, judge_policy, tuning_set
from agents.results import results_markdown
from agents.rollout import run_controller, run_policy
from agents.run_folder import RunFolder
from agents.statistics import interquartile_mean
from agents.summary import summarise
from agents.train import load_policies, train
from asg_env.instances import published_test_instances
from asg_env.rewards import REWARD_TERMS
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
SOURCES = [
    path
    for package in (agents, asg_env)
    for path in sorted(Path(package.__file__).parent.rglob("*.py"))
]


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 200)
        yield


# Who reads the test split


def evaluates_test(source: str) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "evaluate"
        and any(
            isinstance(value, ast.Constant) and value.value == "test"
            for value in [*node.args, *(keyword.value for keyword in node.keywords)]
        )
        for node in ast.walk(ast.parse(source))
    )


def test_test_split_is_evaluated_by_one_module_alone():
    assert evaluates_test('trainer.evaluate("test").correct')  # the check itself works
    assert evaluates_test('trainer.evaluate(split="test")')
    assert not evaluates_test('trainer.evaluate("outer_valid")')
    found = [path for path in SOURCES if evaluates_test(path.read_text(encoding="utf-8"))]
    assert found == [Path(judgement.__file__)]


def test_no_reward_is_measured_on_the_test_split():
    assert {term.split for term in REWARD_TERMS.values()} == {
        None,
        "outer_valid",
        "inner_valid",
        "old_task",
    }


@pytest.mark.parametrize("observation", ["asg", "scaled", "extended"])
def test_episodes_never_read_the_test_split(make_env, instance, monkeypatch, observation):
    reward = dict.fromkeys(REWARD_TERMS, 1.0)
    env = make_env(observation=observation, reward=reward)
    read = []
    original = env.trainer.evaluate
    monkeypatch.setattr(
        env.trainer, "evaluate", lambda split: read.append(split) or original(split)
    )
    policy = RandomPolicy(env.action_space)
    run_policy(env, policy, instance, seed=0, deterministic=False)
    run_controller(env, Static((0.1,) * 5), instance)
    assert {"outer_valid", "inner_valid"} <= set(read)
    assert "test" not in read
    judge_controller(env, Static((0.1,) * 5), instance)  # the control: judging does read it
    assert read.count("test") == 1


def test_training_and_tuning_work_where_there_is_no_test_split(
    make_env, make_experiment, no_workers, inline_pool, tmp_path, monkeypatch
):
    experiment = make_experiment(agent={"updates": 1})
    env = inline_pool(TASK, experiment.env).env
    monkeypatch.delitem(env.trainer.splits, "test")
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    train(run, lambda *_: None)
    evaluation = Evaluation(run, inline_pool(TASK, experiment.env), groups=5)
    assert evaluation._search("unknown-scale", 0, "search.json").episodes == 4


# Judging one run


def test_judge_reports_what_the_trained_network_does(env, instance):
    result = judge_controller(env, Static((0.1,) * 5), instance)
    test = env.trainer.splits["test"]
    with torch.no_grad():
        logits, _ = env.trainer.optimizee(test.batch(slice(None)))
    expected = logits.argmax(dim=1) == test.labels
    assert result.correct.dtype == bool
    assert result.correct.shape == (len(test),)
    assert (torch.from_numpy(result.correct) == expected).float().mean() > 0.999
    assert 0.5 < result.retention <= 1


def test_judge_policy_runs_the_episode_that_run_policy_runs(env, instance):
    policy = RandomPolicy(env.action_space)
    judged = judge_policy(env, policy, instance, 3, False).episode
    plain = run_policy(env, policy, instance, 3, False)
    np.testing.assert_array_equal(judged.actions, plain.actions)
    np.testing.assert_array_equal(judged.accuracy, plain.accuracy)


def test_judge_scores_a_diverged_run_zero(make_env, instance):
    result = judge_controller(make_env(base_lr=1e25), Static((1.0,) * 5), instance)
    assert result.episode.diverged
    assert not result.correct.any()
    assert len(result.correct) == 1500
    assert result.retention == 0.0


def test_judge_scores_divergence_zero_whatever_the_network_answers(env, instance):
    run_controller(env, Static((0.1,) * 5), instance)
    correct, recall, retention = judgement.test_network(env.trainer, diverged=False)
    assert correct.mean() > 0.2
    assert recall == pytest.approx(correct.mean(), abs=1e-6)  # the classes are balanced
    assert retention > 0.5
    correct, recall, retention = judgement.test_network(env.trainer, diverged=True)
    assert recall == 0.0
    assert correct.shape == (1500,)
    assert not correct.any()
    assert retention == 0.0


# The protocol


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """A copy that the evaluation may write its searches to."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run.path, path)
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def rows(run, inline_pool):
    pool = inline_pool(TASK, run.experiment.env)
    said = []
    evaluation = Evaluation(run, pool, groups=5, report=said.append)
    result = evaluation.rows(load_policies(run), RandomPolicy(pool.env.action_space), 2)
    assert "random policy" in said
    return result


def named(rows: list[Row], name: str) -> Row:
    (row,) = [row for row in rows if row.name == name]
    return row


def test_rows_hold_the_controller_first_then_every_baseline(rows):
    names = [row.name for row in rows]
    assert names[2:] == [
        "static search",
        "static, scale known (clipped)",
        "static, scale known (unclipped)",
        *FAMILIES,
        "random policy",
    ]
    assert set(names[:2]) == set(protocol.CONTROLLER_ROWS.values())
    assert [row.name for row in rows if row.reference] == names[3:5]


def test_rows_are_judged_on_the_published_test_instances(rows):
    listed = published_test_instances(TASK, "unknown-scale")[:2]
    for row in rows:
        assert [r.episode.instance for results in row.results for r in results] == list(listed)
        assert row.correct().shape == (1, 2, 1500)


def test_rows_charge_what_each_method_cost(rows):
    # 2 updates x 2 instances x 2 rollouts, then 2 x 8 to choose greedy or sampled actions;
    # 6 inner steps each; 50 images at reset and each step.
    for name in ("controller (sampled)", "controller (greedy)"):
        row = named(rows, name)
        assert row.tuning_episodes == 8 + 16
        assert row.tuning_inner_steps == 24 * 6
        assert row.tuning_images == 24 * 4 * 50
    assert named(rows, "static search").tuning_episodes == 4
    for family, candidates in FAMILIES.items():
        assert named(rows, family).tuning_episodes == len(candidates(5))  # on one instance
    assert named(rows, "random policy").tuning_episodes == 0


def test_rows_of_the_greedy_controller_take_its_most_likely_actions(rows, run, inline_pool):
    env = inline_pool(TASK, run.experiment.env).env
    (policy,) = load_policies(run)
    for result in named(rows, "controller (greedy)").results[0]:
        episode = run_policy(env, policy, result.episode.instance, 123, True)  # no seed matters
        np.testing.assert_array_equal(episode.actions, result.episode.actions)


def test_rows_repeat_exactly_and_keep_their_searches(rows, run, inline_pool):
    stored = (run.path / "seed-0" / "search.json").read_bytes()
    pool = inline_pool(TASK, run.experiment.env)
    evaluation = Evaluation(run, pool, groups=5)
    again = evaluation.rows(load_policies(run), RandomPolicy(pool.env.action_space), 2)
    for first, second in zip(rows, again, strict=True):
        np.testing.assert_array_equal(first.correct(), second.correct(), err_msg=first.name)
        assert first.setting == second.setting
        assert first.tuning_episodes == second.tuning_episodes
    assert (run.path / "seed-0" / "search.json").read_bytes() == stored


def test_rows_choose_a_familys_best_candidate_on_train_instances(run, inline_pool, monkeypatch):
    pool = inline_pool(TASK, run.experiment.env)
    tried = []
    original = evaluate.Scorer.score

    def score(self, candidates, instances):
        scores = original(self, candidates, instances)
        tried.append((scores, self._instances))
        return scores

    monkeypatch.setattr(evaluate.Scorer, "score", score)
    listed = published_test_instances(TASK, "unknown-scale")[:1]
    row = Evaluation(run, pool, groups=5)._tuned_row("uniform", FAMILIES["uniform"](5), listed)
    ((scores, instances),) = tried
    assert scores[row.setting] == max(scores.values())
    assert not {i.head_seed for i in instances} & {
        i.head_seed for i in published_test_instances(TASK, "unknown-scale")
    }
    np.testing.assert_array_equal(
        row.results[0][0].episode.multipliers, [[float(row.setting)] * 5] * 3
    )


def test_rows_divide_the_scale_known_vector_by_each_instances_scale(rows):
    row = named(rows, "static, scale known (unclipped)")
    vector = [float(m) for m in row.setting.strip("()").split(",")]
    for result in row.results[0]:
        controller = KnownScale(tuple(vector), clip=False)
        controller.begin(result.episode.instance, SimpleNamespace(layer_groups=range(5)))
        np.testing.assert_allclose(
            result.episode.multipliers[0], controller.multipliers(0.0, None), rtol=1e-6
        )


def test_rows_have_no_reference_line_where_the_scale_is_fixed(
    make_experiment, inline_pool, no_workers, tmp_path
):
    experiment = make_experiment(env={"instances": "fixed"}, agent={"updates": 1})
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    train(run, lambda *_: None)
    pool = inline_pool(TASK, experiment.env)
    found = Evaluation(run, pool, groups=5)._search_rows(
        published_test_instances(TASK, "fixed")[:1]
    )
    assert [row.name for row in found] == ["static search"]


def test_rows_leave_the_search_out_when_its_budget_is_zero(make_experiment, inline_pool, tmp_path):
    experiment = make_experiment(train={"search_episodes": 0})
    run = RunFolder(tmp_path, experiment)
    pool = inline_pool(TASK, experiment.env)
    assert Evaluation(run, pool, groups=5)._search_rows([]) == []


def test_rows_leave_the_reference_out_when_told_to(make_experiment, inline_pool, tmp_path):
    experiment = make_experiment(train={"reference": False})
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    train(run, lambda *_: None)
    pool = inline_pool(TASK, experiment.env)
    found = Evaluation(run, pool, groups=5)._search_rows(
        published_test_instances(TASK, "unknown-scale")[:1]
    )
    assert [row.name for row in found] == ["static search"]
    assert not (run.path / "known_scale.json").exists()


# The summary


@pytest.fixture(scope="module")
def summary(rows, make_experiment):
    return summarise(rows, make_experiment())


def test_summary_is_plain_json_and_states_its_protocol(summary, rows):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    protocol = summary["protocol"]
    assert protocol["reward"] == "1 x gain"
    assert (protocol["training_seeds"], protocol["test_images"]) == (1, 1500)
    assert len(protocol["instances"]) == 2
    assert [entry["name"] for entry in summary["rows"]] == [row.name for row in rows]


def test_summary_numbers_follow_from_the_rows(summary, rows):
    primary = rows[0].correct().mean(axis=-1)
    for entry, row in zip(summary["rows"], rows, strict=True):
        accuracy = row.correct().mean(axis=-1)
        estimate = entry["accuracy"]
        assert estimate["iqm"] == pytest.approx(interquartile_mean(accuracy.reshape(-1)), abs=1e-6)
        assert estimate["low"] <= estimate["iqm"] <= estimate["high"]
        assert (estimate["seeds"], estimate["instances"]) == (1, 2)
        assert entry["mean"] == pytest.approx(accuracy.mean())
        assert entry["per_instance"] == accuracy.round(6).tolist()
        assert entry["diverged"] == 0.0
        if row is rows[0]:
            assert "controller_minus_this" not in entry
        else:
            assert entry["controller_minus_this"]["iqm"] == pytest.approx(
                interquartile_mean((primary - accuracy).reshape(-1)), abs=1e-6
            )


def test_summary_repeats_exactly(summary, rows, make_experiment):
    assert summarise(rows[:3], make_experiment())["rows"] == summary["rows"][:3]


def test_summary_counts_diverged_runs_as_zero(rows, make_env, make_experiment, instance):
    results = [judge_controller(make_env(base_lr=1e25), Static((1.0,) * 5), instance)] * 2
    entry = summarise([rows[0], Row("bad", "", [results])], make_experiment())["rows"][1]
    assert entry["diverged"] == 1.0
    assert entry["accuracy"] == {"iqm": 0.0, "low": 0.0, "high": 0.0, "seeds": 1, "instances": 2}
    assert entry["retention"] == 0.0


def test_summary_says_nothing_of_a_retention_that_was_not_measured(rows, make_experiment):
    def without(row):
        results = [[replace(r, retention=None) for r in results] for results in row.results]
        return replace(row, results=results)

    summary = summarise([without(row) for row in rows[:2]], make_experiment())
    assert [entry["retention"] for entry in summary["rows"]] == [None, None]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    lines = results_markdown(summary).splitlines()
    column = lines[2].split(" | ").index("retention")
    assert {line.split(" | ")[column] for line in lines[4:6]} == {"–"}


@pytest.mark.parametrize("diverged", [False, True])
def test_retention_is_unknown_without_an_old_task(env, monkeypatch, diverged):
    monkeypatch.delitem(env.trainer.splits, "old_task")
    assert judgement.test_network(env.trainer, diverged)[2] is None


def test_summary_agrees_with_the_environment_on_a_class_without_images(
    make_env, make_experiment, instance, monkeypatch
):
    env = make_env()
    monkeypatch.setitem(
        env.trainer.splits,
        "test",
        env.trainer.splits["test"].select(
            torch.nonzero(env.trainer.splits["test"].labels != 4).flatten()
        ),
    )
    result = judge_controller(env, Static((0.1,) * 5), instance)
    experiment = make_experiment(env={"metric": "mean_recall"})
    groups, _, classes = experiment._loaded
    experiment.__dict__["_loaded"] = (groups, env.trainer.splits["test"].labels, classes)
    (entry,) = summarise([Row("controller", "", [[result]])], experiment)["rows"]
    recall = env.trainer.evaluate("test").mean_recall
    assert 0 < recall <= 4 / 5
    assert entry["mean_recall"] == pytest.approx(recall, abs=1e-6)
    assert entry["accuracy"]["iqm"] == pytest.approx(recall, abs=1e-6)
    assert entry["accuracy"]["low"] <= recall <= entry["accuracy"]["high"]


@pytest.mark.parametrize(("better", "first"), [(True, True), (False, False)])
def test_the_mode_that_does_better_on_train_instances_comes_first(
    run, inline_pool, monkeypatch, better, first
):
    judged = []

    def outcome(env, policy, instance, seed, deterministic):
        judged.append(instance)
        accuracy = 0.6 if deterministic is better else 0.4
        return SimpleNamespace(
            accuracy=np.array([0.1, accuracy]), inner_steps=6, validation_images=50
        )

    monkeypatch.setattr(protocol, "run_policy", outcome)
    pool = inline_pool(TASK, run.experiment.env)
    evaluation = Evaluation(run, pool, groups=5)
    modes, cost = evaluation._better_first(load_policies(run))
    assert modes == (first, not first)
    assert cost == {"episodes": 16, "inner_steps": 96, "validation_images": 800}
    test_instances = published_test_instances(TASK, run.experiment.env.instances)
    assert not set(judged) & set(test_instances)


@pytest.mark.parametrize("reward", ["inner_valid_gain", "retention", "train_loss"])
def test_no_real_label_chooses_the_mode_where_the_reward_reads_none(
    make_experiment, trained_run, tmp_path, reward
):
    run = RunFolder(tmp_path, make_experiment(env={"reward": reward}))
    run.write_json("provenance.json", {})
    policies, no_pool = load_policies(trained_run), None  # not an episode is run
    evaluation = Evaluation(run, no_pool, groups=5)
    assert evaluation._better_first(policies) == ((True, False), {})
    run.write_json("provenance.json", {"imported": {"file": "policy.pth"}})
    assert evaluation._better_first(policies) == ((False, True), {})  # as the original acted


@pytest.mark.parametrize(
    ("primary", "greedy"), [("controller (greedy)", True), ("controller (sampled)", False)]
)
def test_a_run_acts_as_its_comparison_chose(make_experiment, tmp_path, primary, greedy):
    run = RunFolder(tmp_path, make_experiment())
    run.write_json("provenance.json", {})
    assert acts_greedily(run)  # before any comparison
    run.write_json("provenance.json", {"imported": {"file": "policy.pth"}})
    assert not acts_greedily(run)  # the original draws its actions
    run.write_json("results.json", {"protocol": {"primary": primary}})
    assert acts_greedily(run) is greedy


def test_a_run_of_a_benchmark_acts_as_was_chosen_for_the_training_seed(make_experiment, tmp_path):
    run = RunFolder(tmp_path, make_experiment(train={"seeds": 2}))
    for seed, greedy in enumerate([False, True]):
        run.seed_folder(seed).mkdir()
        run.write_json(f"seed-{seed}/mode.json", {"greedy": greedy, "cost": {}})
    assert [acts_greedily(run, seed) for seed in (0, 1)] == [False, True]
    assert not acts_greedily(run)  # the first seed's
    run.write_json("results.json", {"protocol": {"primary": "controller (sampled)"}})
    assert not acts_greedily(run, 1)  # a comparison of all seeds goes before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.json", "{"),
        ("results.json", "[]"),
        ("results.json", "{}"),
        ("results.json", '{"protocol": 3}'),
        ("results.json", '{"protocol": {"primary": "oracle"}}'),
        ("seed-0/mode.json", ""),
        ("seed-0/mode.json", "[]"),
        ("seed-0/mode.json", '{"cost": {}}'),
        ("seed-0/mode.json", '{"greedy": "yes"}'),
        ("seed-0/mode.json", '{"greedy": []}'),
    ],
)
def test_a_damaged_comparison_is_refused(make_experiment, tmp_path, name, text):
    run = RunFolder(tmp_path, make_experiment())
    run.seed_folder(0).mkdir()
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is no whole comparison; repeat it with asg evaluate"):
        acts_greedily(run)


def test_tuning_instances_spread_evenly_over_the_hidden_scales():
    drawn = tuning_set(TASK, "unknown-scale", 4)
    scales = [instance.base_lr_scale for instance in drawn]
    np.testing.assert_allclose(np.log10(scales), [-0.75, -0.25, 0.25, 0.75])
    assert len({instance.data_seed for instance in drawn}) == 4
    assert not set(drawn) & set(published_test_instances(TASK, "unknown-scale"))
    assert {instance.base_lr_scale for instance in tuning_set(TASK, "fixed", 4)} == {1.0}
