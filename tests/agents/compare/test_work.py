import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from agents.baselines import small_backbone, uniform
from agents.compare import work as compare
from agents.compare.plan import CONTROLLER
from agents.compare.work import COMPARISON_SEED, tuning_trial
from agents.compare.work import test_trial as run_test_trial  # not a test of its own
from agents.fit import LiveController, fit
from agents.judgement import judge_network
from agents.run_folder import RunFolder
from agents.search import train_instances
from agents.train import load_policies
from asg_env.build import build_trainer
from asg_env.core.seeding import derive_seed
from asg_env.instances import published_test_instances
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
TESTED = published_test_instances(TASK, "fixed")[:2]
TUNED = train_instances(TASK, "fixed", derive_seed(COMPARISON_SEED, "compare"), 2)
# The row that shares its rate is not the first; of its candidates the second is better.
ROWS = [
    {"name": "guided", "rate": "shared", "tune": {"kl": [30, 0.1]}, "paper": 2},
    {
        "name": "sharing",
        "rule": "small-backbone",
        "share_rate": True,
        "guidance": {},
        "tune": {"rate": [0.003, 0.3]},
    },
    {"name": "plain", "rate": 0.1, "guidance": {}},
]


def silent(row, done):
    pass


@pytest.fixture(scope="module")
def finished(make_plan, make_comparison, trial_pool, tmp_path_factory):
    """A whole comparison: its rows by name, what was reported and how often each job ran."""
    reports, pool = [], trial_pool()
    folder = tmp_path_factory.mktemp("finished")
    comparison = make_comparison(make_plan(ROWS), folder, tuning=2)
    announced = comparison.trainings()
    rows = comparison.run(pool, lambda *report: reports.append(report))
    return SimpleNamespace(
        announced=announced,
        rows=rows,
        comparison=comparison,
        folder=folder,
        reports=reports,
        ran=pool.trainings,
    )


@pytest.fixture
def named(finished):
    return {row["name"]: row for row in finished.rows}


@pytest.fixture
def train_by_hand(make_settings):
    """Train as a script of one's own would; return the trainer and the last window's record."""

    def train(controller, instance, **env):
        settings = make_settings(**env)
        trainer = build_trainer(TASK, settings)
        records = fit(trainer, controller, instance, settings.windows())
        return trainer, records[-1]

    return train


def as_text(correct) -> str:
    return "".join("1" if c else "0" for c in correct)


def plain(value):
    """What JSON makes of a value."""
    return json.loads(json.dumps(value))


def test_comparison_chooses_the_candidate_with_the_best_mean_on_train_instances(
    named, train_by_hand
):
    scores = {}
    for top in (0.003, 0.3):
        accuracies = [
            train_by_hand(small_backbone(top, 5), instance, guidance={})[0]
            .evaluate("outer_valid")
            .accuracy
            for instance in TUNED
        ]
        scores[f"rate {top:g}"] = float(np.mean(accuracies))
    assert named["sharing"]["tuning"] == scores
    assert scores["rate 0.3"] > scores["rate 0.003"]
    assert (named["sharing"]["setting"], named["sharing"]["rate"]) == ("rate 0.3", 0.3)


def test_comparison_tunes_the_other_rows_at_the_shared_rate(named, train_by_hand):
    scores = {}
    for weight in (30, 0.1):
        accuracies = [
            train_by_hand(uniform(0.3, 5), instance, guidance={"kl": weight})[0]
            .evaluate("outer_valid")
            .accuracy
            for instance in TUNED
        ]
        scores[f"kl {weight:g}, rate 0.3"] = float(np.mean(accuracies))
    row = named["guided"]
    assert row["tuning"] == scores
    assert row["setting"] == max(scores, key=lambda name: scores[name])
    assert row["rate"] == 0.3
    assert row["guidance"] == {"kl": float(row["setting"].split()[1].strip(","))}


@pytest.mark.parametrize("metric", ["accuracy", "mean_recall"])
@pytest.mark.parametrize("split", ["outer_valid", "inner_valid"])
def test_comparison_chooses_by_the_split_and_the_metric_it_is_told(
    make_plan, make_comparison, trial_pool, train_by_hand, tmp_path, metric, split
):
    rows = [{"name": "a", "tune": {"rate": [0.01, 0.1]}}]
    plan = make_plan(rows, metric=metric)
    comparison = make_comparison(plan, tmp_path, tune_on=split)
    (row,) = comparison.run(trial_pool(), silent)
    assert row["tuning"] == {
        f"rate {top:g}": train_by_hand(uniform(top, 5), TUNED[0])[0].evaluate(split).score(metric)
        for top in (0.01, 0.1)
    }


def test_comparison_takes_the_first_of_equal_candidates(
    make_plan, make_comparison, trial_pool, tmp_path
):
    # At rate 0 nothing trains, so that all weights give the same network.
    rows = [{"name": "a", "rate": 0, "tune": {"kl": [3, 1, 2]}}]
    (row,) = make_comparison(make_plan(rows), tmp_path).run(trial_pool(), silent)
    assert len(set(row["tuning"].values())) == 1
    assert row["setting"] == "kl 3"


def test_comparison_results_are_those_of_an_ordinary_training(named, train_by_hand):
    assert named["plain"]["setting"] == "rate 0.1"
    assert named["plain"]["tuning"] == {}
    (results,) = named["plain"]["results"]
    for instance, result in zip(TESTED, results, strict=True):
        trainer, record = train_by_hand(uniform(0.1, 5), instance, guidance={})
        judged = judge_network(trainer, False)
        assert result["instance"] == instance.to_dict()
        assert result["correct"] == as_text(trainer.evaluate("test").correct)
        assert result["confusion"] == judged.confusion.tolist()
        assert result["calibration_error"] == judged.calibration_error
        assert tuple(result["energies"]) == judged.energies
        assert result["retention"] == trainer.retention()
        assert result["inner_steps"] == record["inner_step"] == 6
        assert tuple(result["drifts"]) == record["drifts"]
        assert result["diverged"] is False
        assert result["seconds"] > 0


def test_comparison_tests_the_candidate_that_it_chose(named, train_by_hand):
    for name, controller, guidance in (
        ("sharing", small_backbone(0.3, 5), {}),
        ("guided", uniform(0.3, 5), named["guided"]["guidance"]),
    ):
        (results,) = named[name]["results"]
        for instance, result in zip(TESTED, results, strict=True):
            trainer, _ = train_by_hand(controller, instance, guidance=guidance)
            assert result["correct"] == as_text(trainer.evaluate("test").correct)


def test_comparison_returns_rows_in_the_order_of_the_file_and_keeps_each(finished):
    assert [row["name"] for row in finished.rows] == ["guided", "sharing", "plain"]
    assert [row["paper"] for row in finished.rows] == [2, None, None]
    files = sorted(path.name for path in (finished.folder / "rows").iterdir())
    assert files == ["guided.json", "plain.json", "sharing.json"]
    for row in finished.rows:
        text = (finished.folder / "rows" / f"{row['name']}.json").read_text(encoding="utf-8")
        kept = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert kept == plain(row)


def test_comparison_reports_every_training(finished):
    counts = Counter()
    for row, done in finished.reports:
        counts[row] += done
    assert counts == {"sharing": 6, "guided": 6, "plain": 2}
    assert next(iter(counts)) == "sharing"
    assert finished.ran == {"tuning_trial": 8, "test_trial": 6}
    assert finished.announced == sum(finished.ran.values())
    assert finished.comparison.trainings() == 0


def test_comparison_counts_no_tuning_where_there_is_no_choice(
    make_plan, make_comparison, trial_pool, tmp_path
):
    pool = trial_pool()
    comparison = make_comparison(make_plan([{"name": "a", "tune": {"rate": [0.1]}}]), tmp_path)
    announced = comparison.trainings()
    comparison.run(pool, silent)
    assert announced == sum(pool.trainings.values()) == 2


def test_comparison_tests_on_other_instances_than_it_tunes_on(make_plan, make_comparison, tmp_path):
    comparison = make_comparison(make_plan(ROWS), tmp_path, seeds=40, tuning=50)
    assert comparison.tested == published_test_instances(TASK, "fixed")
    tested = {seed for i in comparison.tested for seed in (i.head_seed, i.data_seed)}
    tuned = {seed for i in comparison._tuned for seed in (i.head_seed, i.data_seed)}
    assert not tested & tuned
    assert len(comparison._tuned) == 50


def test_comparison_reads_no_test_image_while_it_tunes(
    make_plan, make_comparison, trial_pool, tmp_path, monkeypatch
):
    reads = []

    class Watched(dict):
        def __getitem__(self, split):
            reads.append((now[0], split))
            return super().__getitem__(split)

    now = [""]

    def build(*arguments):
        trainer = build_trainer(*arguments)
        trainer.splits = Watched(trainer.splits)
        return trainer

    def traced(function):
        def trial(*arguments):
            now[0] = function.__name__
            return function(*arguments)

        return trial

    monkeypatch.setattr(compare, "build_trainer", build)
    for function in (tuning_trial, run_test_trial):
        monkeypatch.setattr(compare, function.__name__, traced(function))
    comparison = make_comparison(make_plan([ROWS[1], ROWS[2]]), tmp_path)
    comparison.run(trial_pool(), silent)
    while_tuning = {split for trial, split in reads if trial == "tuning_trial"}
    while_testing = {split for trial, split in reads if trial == "test_trial"}
    assert while_tuning == {"train", "outer_valid"}
    assert while_testing == {"train", "test", "old_task"}


def test_comparison_that_was_killed_goes_on_with_what_is_missing(
    finished, make_plan, make_comparison, trial_pool, without_seconds, tmp_path
):
    def kill_in_the_second_row(row, done):
        if row == "guided":
            raise KeyboardInterrupt

    def comparison():
        return make_comparison(make_plan(ROWS), tmp_path, tuning=2)

    with pytest.raises(KeyboardInterrupt):
        comparison().run(trial_pool(), kill_in_the_second_row)
    first = tmp_path / "rows" / "sharing.json"
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [first.name]
    before, reported, pool = first.read_bytes(), [], trial_pool()

    announced = comparison().trainings()
    rows = comparison().run(pool, lambda row, done: reported.append(row))

    assert set(reported) == {"guided", "plain"}
    assert pool.trainings == {"tuning_trial": 4, "test_trial": 4}
    assert announced == 8
    assert first.read_bytes() == before
    assert without_seconds(rows) == without_seconds(finished.rows)


def test_finished_comparison_trains_nothing(finished, make_plan, make_comparison, trial_pool):
    pool = trial_pool()
    rows = make_comparison(make_plan(ROWS), finished.folder, tuning=2).run(pool, silent)
    assert pool.trainings == {}
    assert rows == plain(finished.rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"seeds": 3},
        {"tuning": 1},
        {"tune_on": "inner_valid"},
        {"env": {"base_lr": 0.2}},
        {"rows": [ROWS[1], ROWS[2]]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_comparison_refuses_a_row_of_other_settings(
    finished, make_plan, make_comparison, trial_pool, tmp_path, changed
):
    shutil.copytree(finished.folder / "rows", tmp_path / "rows")
    plan = make_plan(changed.pop("rows", ROWS), **changed.pop("env", {}))
    comparison = make_comparison(plan, tmp_path, **{"tuning": 2, **changed})
    with pytest.raises(ConfigError) as error:
        comparison.run(trial_pool(), silent)
    assert str(error.value) == (
        f"{tmp_path}/rows/sharing.json is a row of other settings; go on with those, or add "
        "--overwrite"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '"digest"', "null"])
def test_comparison_refuses_a_damaged_row(make_plan, make_comparison, trial_pool, tmp_path, text):
    comparison, pool = make_comparison(make_plan([ROWS[2]]), tmp_path), trial_pool()
    (tmp_path / "rows" / "plain.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        comparison.run(pool, silent)
    assert str(error.value) == f"{tmp_path}/rows/plain.json is no whole row; delete it"
    assert pool.trainings == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"guidance": {"feature_l2": {"weight": 1, "layer": "nope"}}},
            "`rows.b.guidance`: `layer` of feature_l2 must be the dotted name of a module of the "
            "backbone, such as 0, 1, 2, 3, 4, 5, got 'nope'; mend the file",
        ),
        (
            {"guidance": {"kl": {"weight": 1, "temperature": 0}}},
            "`rows.b.guidance`: `temperature` of kl must be a finite number > 0, got 0; mend the "
            "file",
        ),
        ({"options": {"decay": 0.5}}, "`options` must fit the rule uniform, got {'decay': 0.5}: "),
    ],
    ids=["layer", "temperature", "options"],
)
def test_comparison_refuses_what_cannot_be_built_before_it_trains(
    make_plan, make_comparison, trial_pool, tmp_path, changes, message
):
    plan, pool = make_plan([ROWS[2], {"name": "b", "rate": 0.1, **changes}]), trial_pool()
    with pytest.raises(ConfigError) as error:
        make_comparison(plan, tmp_path).run(pool, silent)
    assert str(error.value).startswith(message)
    assert pool.trainings == {}


# Controllers


def test_comparison_judges_each_training_seed_of_a_controller(
    make_plan, make_comparison, trial_pool, trained_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    shutil.copytree(run / "seed-0", run / "seed-1")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    assert text.count("seeds: 1") == 1
    (run / "config.yaml").write_text(text.replace("seeds: 1", "seeds: 2"), encoding="utf-8")
    (run / "results.json").write_text('{"protocol": {"primary": "controller (sampled)"}}')
    plan = make_plan([ROWS[2]], runs=[run])
    comparison, pool = make_comparison(plan, tmp_path), trial_pool()

    announced = comparison.trainings()
    first, row = comparison.run(pool, silent)

    assert (first["controller"], row["controller"]) == (False, True)
    assert (row["name"], row["paper"], row["rate"], row["tuning"]) == (CONTROLLER, 9, None, {})
    assert row["setting"] == "run, sampled, reward 1 x gain"
    assert row["reads_real_labels"] is True
    assert np.shape([[r["inner_steps"] for r in seed] for seed in row["results"]]) == (2, 2)
    assert pool.trainings == {"test_trial": 6}
    assert announced == 6
    settings = trained_run.experiment.env
    for index, policy in enumerate(load_policies(RunFolder.open(run))):
        for number, instance in enumerate(TESTED):
            trainer = build_trainer(TASK, settings)
            policy.seed(derive_seed(COMPARISON_SEED, CONTROLLER, index, number))
            controller = LiveController(policy, settings, trainer, deterministic=False)
            records = fit(trainer, controller, instance, settings.windows())
            result = row["results"][index][number]
            assert result["correct"] == as_text(trainer.evaluate("test").correct)
            assert tuple(result["drifts"]) == records[-1]["drifts"]
    # The weights are the same, the draws are not.
    drifts = [[r["drifts"] for r in seed] for seed in row["results"]]
    assert drifts[0] != drifts[1]
    again = make_comparison(make_plan([ROWS[2]], runs=[run]), tmp_path).run(pool, silent)
    assert again == plain([first, row])
    assert pool.trainings == {"test_trial": 6}
