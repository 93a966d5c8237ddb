import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from agents.export import export_schedule
from agents.fit import ScheduleController, fit
from agents.policy import RandomPolicy
from agents.rollout import run_policy
from agents.train import load_policies
from asg_env.build import build_trainer
from asg_env.instances import TRAIN_SEEDS
from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import Course
from asg_env.task_settings import settings_class
from asg_env.tasks import load_task
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"


class RecordingPool:
    """Runs jobs on an environment and keeps them and their episodes."""

    def __init__(self, pool) -> None:
        self._pool, self.jobs, self.episodes = pool, [], []

    def map(self, function, jobs):
        assert function is run_policy
        self.jobs = list(jobs)
        self.episodes = list(self._pool.map(function, self.jobs))
        return iter(self.episodes)


@pytest.fixture(scope="module")
def policy(trained_run):
    return load_policies(trained_run)[0]


@pytest.fixture
def pool(inline_pool, trained_run):
    return RecordingPool(inline_pool(TASK, trained_run.experiment.env))


def test_export_averages_the_multipliers_of_its_rollouts(trained_run, policy, pool):
    schedule = export_schedule(trained_run, policy, pool, episodes=5, deterministic=False)
    assert len(pool.jobs) == schedule.episodes == 5
    assert not any(deterministic for *_, deterministic in pool.jobs)
    stacked = np.stack([episode.multipliers for episode in pool.episodes])
    np.testing.assert_allclose(schedule.multipliers, stacked.mean(axis=0))
    np.testing.assert_allclose(schedule.spread, stacked.std(axis=0))
    assert np.max(schedule.spread) > 0
    assert schedule.knots == (0.0, 2 / 6, 4 / 6)


def test_export_keeps_equal_multipliers_to_the_last_bit(trained_run, pool):
    class Stays(RandomPolicy):
        def predict(self, *arguments, **keywords):
            return np.ones(5, int), None

    assert np.mean([[0.01]] * 10, axis=0)[0] != 0.01  # what a plain mean makes of it
    policy = Stays(None)
    schedule = export_schedule(trained_run, policy, pool, episodes=10, deterministic=True)
    assert schedule.multipliers == ((0.01,) * 5,) * 3
    assert schedule.spread == ((0.0,) * 5,) * 3


def test_export_rolls_out_on_fresh_train_instances_with_seeds_of_their_own(
    trained_run, policy, pool
):
    export_schedule(trained_run, policy, pool, scale=0.5, episodes=5, deterministic=False)
    seeds = [seed for _, _, seed, _ in pool.jobs]
    assert len(set(seeds)) == 5
    for _, instance, _, _ in pool.jobs:
        assert instance.base_lr_scale == 0.5
        assert TRAIN_SEEDS[0] <= instance.head_seed < TRAIN_SEEDS[1]
        assert TRAIN_SEEDS[0] <= instance.data_seed < TRAIN_SEEDS[1]
    assert len({instance.head_seed for _, instance, _, _ in pool.jobs}) == 5


def test_export_records_what_the_multipliers_were_learned_with(trained_run, policy, pool):
    schedule = export_schedule(
        trained_run, policy, pool, scale=2.0, episodes=2, deterministic=False
    )
    env = trained_run.experiment.env
    assert schedule.layer_groups == dict(load_task(TASK).layer_groups)
    assert (schedule.task, schedule.instances) == (TASK, "unknown-scale")
    assert (schedule.base_lr, schedule.base_lr_scale) == (env.base_lr * 2.0, 2.0)
    assert (schedule.optimizer, schedule.momentum_form) == ("sgd", "pytorch")
    assert (schedule.lr_factor, schedule.inner_steps) == ("constant", 6)
    assert schedule.provenance["config_digest"] == trained_run.experiment.digest()
    assert schedule.provenance["torch"] == torch.__version__
    assert validate(settings_class(TASK), schedule.settings, "") == env


def test_export_repeats_exactly_and_survives_its_file(trained_run, policy, pool, tmp_path):
    first = export_schedule(trained_run, policy, pool, episodes=3, deterministic=False)
    first.save(tmp_path / "schedule.json")
    assert LearnedSchedule.load(tmp_path / "schedule.json") == first
    assert export_schedule(trained_run, policy, pool, episodes=3, deterministic=False) == first


class SometimesDiverges(RandomPolicy):
    """Holds the start on odd seeds, leaps to the top of the grid on even ones."""

    def __init__(self, leaps) -> None:
        self._leaps = leaps

    def seed(self, seed):
        self._now = self._leaps.pop(0)

    def predict(self, *arguments, **keywords):
        return np.full(5, 6 if self._now else 0), None


def test_export_leaves_diverged_rollouts_out(trained_run, inline_pool, make_settings):
    settings = make_settings(base_lr=1e25, action="grid")
    pool = RecordingPool(inline_pool(TASK, settings))
    leaps = iter([True, False, True, False])
    copies = [SometimesDiverges([leap]) for leap in leaps]
    original = pool.map
    pool.map = lambda function, jobs: original(
        function, [(copy, *job[1:]) for copy, job in zip(copies, jobs, strict=True)]
    )
    schedule = export_schedule(trained_run, copies[0], pool, episodes=4, deterministic=False)
    assert [episode.diverged for episode in pool.episodes] == [True, False, True, False]
    assert schedule.episodes == 2
    np.testing.assert_array_equal(schedule.multipliers, np.zeros((3, 5)))


def test_a_schedule_trains_at_the_rates_of_its_rollouts(trained_run, policy, pool):
    schedule = export_schedule(trained_run, policy, pool, scale=0.1, episodes=1, deterministic=True)
    (episode,) = pool.episodes
    settings = trained_run.experiment.env

    def trained(**changes):
        instance = replace(episode.instance, **changes.pop("instance", {}))
        trainer = build_trainer(TASK, settings.model_copy(update=changes))
        fit(trainer, ScheduleController(Course(schedule, 6)), instance, settings.windows())
        return trainer.weights()

    in_rollouts = trained()
    nominal = trained(base_lr=schedule.base_lr, instance={"base_lr_scale": 1.0})
    assert all(torch.equal(nominal[name], tensor) for name, tensor in in_rollouts.items())


def test_the_median_is_the_rollout_nearest_to_it_in_logarithms(trained_run, make_episode):
    def rollout(*multipliers):
        held = np.array([multipliers, multipliers, multipliers])
        return replace(make_episode([0.0] * 3, accuracy=[0.2] * 4), multipliers=held)

    class Pool:
        def map(self, function, jobs):
            # The median of each group is .03 and .1; the third has one of them and is near the
            # other in logarithms, the first is nearer in plain distance.
            return iter(
                [
                    rollout(0.03, 0.0, 1, 1, 1),
                    rollout(1.0, 0.1, 1, 1, 1),
                    rollout(0.03, 0.3, 1, 1, 1),
                    rollout(0.0, 0.1, 1, 1, 1),
                    rollout(0.1, 1.0, 1, 1, 1),
                ]
            )

    schedule = export_schedule(
        trained_run, None, Pool(), episodes=5, selection="median", deterministic=True
    )
    assert schedule.multipliers == ((0.03, 0.3, 1, 1, 1),) * 3


@pytest.mark.parametrize("selection", ["median", "best"])
def test_export_takes_one_rollout(trained_run, policy, pool, selection):
    schedule = export_schedule(
        trained_run, policy, pool, episodes=7, selection=selection, deterministic=False
    )
    stacked = np.stack([episode.multipliers for episode in pool.episodes])
    if selection == "best":
        chosen = np.argmax([episode.accuracy[-1] for episode in pool.episodes])
    else:
        logs = np.log(np.maximum(stacked, 1e-3))
        chosen = np.abs(logs - np.median(logs, axis=0)).sum(axis=(1, 2)).argmin()
    np.testing.assert_array_equal(schedule.multipliers, stacked[chosen])
    np.testing.assert_allclose(schedule.spread, stacked.std(axis=0))
    assert (schedule.selection, schedule.episodes) == (selection, 7)


def test_export_of_the_best_needs_real_labels(trained_run, policy, pool, monkeypatch):
    monkeypatch.setattr("agents.export.reads_real_labels", lambda experiment: False)
    with pytest.raises(ConfigError, match="--select best needs a run whose reward reads real"):
        export_schedule(trained_run, policy, pool, selection="best", deterministic=True)


def test_export_says_so_when_every_rollout_diverged(trained_run, inline_pool, make_settings):
    class Leap(SometimesDiverges):
        def seed(self, seed):
            self._now = True

    pool = inline_pool(TASK, make_settings(base_lr=1e25, action="grid"))
    with pytest.raises(ConfigError, match=r"all 2 rollouts at scale 3\.0 diverged.*--scale"):
        export_schedule(trained_run, Leap([]), pool, scale=3.0, episodes=2, deterministic=False)


def test_export_and_fit_act_as_a_benchmark_chose_for_the_training_seed(
    asg, trained_run, inline_pool, monkeypatch, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(trained_run.path, run)
    shutil.copytree(run / "seed-0", run / "seed-1")
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["train"]["seeds"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    for seed, greedy in enumerate([True, False]):
        text = json.dumps({"greedy": greedy, "cost": {}})
        (run / f"seed-{seed}" / "mode.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr("agents.cli.export.RolloutPool", inline_pool)
    found = []
    for seed in (0, 1):
        out, of_seed = tmp_path / f"schedule-{seed}.json", ["--training-seed", str(seed)]
        assert asg("export", run, "--out", out, "--episodes", "1", *of_seed).status == 0
        found.append(LearnedSchedule.load(out).provenance["actions"])
        out = tmp_path / f"fit-{seed}"
        assert asg("fit", TASK, "--controller", run, "--out", out, *of_seed).status == 0
        found.append(json.loads((out / "fit.json").read_text(encoding="utf-8"))["actions"])
    assert found == ["greedy", "greedy", "sampled", "sampled"]
