"""One trial of a benchmark: train or tune, then judge on test instances. Runs in any process."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from agents.baselines import Controller, Static
from agents.benchmark.plan import TUNED_RULES, Benchmark, Suite, Trial
from agents.benchmark.table import SELECTION
from agents.experiment import Experiment
from agents.judgement import test_network
from agents.policy import Policy, RandomPolicy
from agents.protocol import (
    EVALUATION_SEED,
    MODE,
    MODE_INSTANCES,
    TestResult,
    choose_mode,
    reads_real_labels,
    tuning_set,
)
from agents.records import episode_record
from agents.rollout import Episode, RolloutPool, run_controller, run_policy
from agents.run_folder import RunFolder, provenance, training_cost, write_text
from agents.search import search, tune, tuning_instances
from agents.train import train_seed
from asg_env.build import task_of
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from asg_env.validation import ConfigError

SELECTION_OFFSET = 10_000  # keeps draws of actions apart from those on test instances
UNSEEN = {"observation": "scaled"}  # what no baseline looks at shall cost no validation images
SELECTION_INSTANCES = 16  # train instances by which the best of several methods is told
Act = Callable[[LayerwiseLREnv, Instance, int], Episode]  # the last: the number of the run


def test_file(folder: Path, suite: str) -> Path:
    """Where a trial keeps how it did on a suite."""
    return folder / f"test-{suite}.json"


def is_done(benchmark: Benchmark, trial: Trial, root: Path) -> bool:
    """Whether a trial has been judged on every suite, and on train instances."""
    folder = trial.folder(root)
    return not _missing(benchmark, folder) and (folder / SELECTION).exists()


def run_trial(benchmark: Benchmark, trial: Trial, root: Path) -> None:
    """Do what is still missing of a trial; a training that was cut off is gone on with.

    Args:
        benchmark: What the trial is of.
        trial: What to do.
        root: Folder of the benchmark; processes on other machines must see it too.

    Raises:
        ConfigError: A file of an earlier run is damaged.
    """
    torch.set_num_threads(1)  # bits change with the thread count
    suite = benchmark.suites[trial.suite]
    if trial.kind == "agent":
        _run_agent(benchmark, trial, suite, root)
    else:
        _run_baseline(benchmark, trial, suite, root)


def _run_agent(benchmark: Benchmark, trial: Trial, suite: Suite, root: Path) -> None:
    folder = trial.folder(root)
    experiment = benchmark.experiment(trial.suite, trial.method)
    run = RunFolder(folder.parent, experiment)
    train_seed(run, trial.index, lambda *_: None, workers=0)
    checkpoint = folder / "checkpoints" / experiment.agent_module.CHECKPOINT
    policy = experiment.agent_module.load_policy(checkpoint, experiment)
    cost = training_cost(folder)
    greedy, choosing = _mode(folder, policy, experiment)
    cost = {key: cost[key] + choosing[key] for key in cost}

    def acting(policy: Policy) -> Act:
        def act(env: LayerwiseLREnv, instance: Instance, number: int) -> Episode:
            seed = derive_seed(EVALUATION_SEED, "benchmark", trial.method, trial.index, number)
            return run_policy(env, policy, instance, seed, greedy)

        return act

    for other in _missing(benchmark, folder):
        there = benchmark.seen_by(trial.suite, trial.method, other.name)
        try:
            # Other layer groups or terms to observe need weights for them, which few networks have.
            act = acting(there.agent_module.load_policy(checkpoint, there))
        except ConfigError as error:
            _write(benchmark, trial, root, other, cost, "", [], str(error))
            continue
        mode = "greedy" if greedy else "sampled"
        _write(benchmark, trial, root, other, cost, mode, _judged(benchmark, other, there.env, act))
    _select(trial, root, suite, experiment.env, acting(policy))


def _missing(benchmark: Benchmark, folder: Path) -> list[Suite]:
    """Suites that a trial has not been judged on."""
    return [s for s in benchmark.suites.values() if not test_file(folder, s.name).exists()]


def _judged(
    benchmark: Benchmark, tested: Suite, settings: EnvSettings, act: Act
) -> list[TestResult]:
    """Judge a method on the test instances of a suite, as the settings show them."""
    env = LayerwiseLREnv(tested.task, settings)
    results = []
    for number, instance in enumerate(tested.tests(benchmark.settings.test_instances)):
        episode = act(env, instance, number)
        results.append(TestResult(episode, *test_network(env.trainer, episode.diverged)))
    return results


def _select(trial: Trial, root: Path, suite: Suite, settings: EnvSettings, act: Act) -> None:
    """Keep how a finished method does on train instances, by which the best one is told.

    The same for all methods of a suite, and others than those that anything was tuned on. It is
    the last thing to be written of a trial.
    """
    path = trial.folder(root) / SELECTION
    if path.exists():
        return
    seed = derive_seed(EVALUATION_SEED, "selection")
    listed = tuning_instances(suite.task, settings.instances, seed, SELECTION_INSTANCES)
    env = LayerwiseLREnv(suite.task, settings)
    accuracies = []
    for number, instance in enumerate(listed):
        episode = act(env, instance, SELECTION_OFFSET + number)
        accuracy = 0.0
        if not episode.diverged:
            accuracy = env.trainer.evaluate("outer_valid").score(settings.metric)
        accuracies.append(accuracy)
    write_text(path, json.dumps({"outer_valid": accuracies}) + "\n")


def _mode(folder: Path, policy: Policy, experiment: Experiment) -> tuple[bool, dict[str, int]]:
    """Greedy or sampled actions, chosen once on train instances; and what choosing cost."""
    path = folder / MODE
    if not path.exists():
        cost = {"episodes": 0, "inner_steps": 0, "validation_images": 0}
        greedy = True
        if reads_real_labels(experiment):
            listed = tuning_set(experiment.task, experiment.env.instances, MODE_INSTANCES)
            with RolloutPool(experiment.task, experiment.env, 0) as pool:
                greedy, cost = choose_mode(pool, [policy], listed)
        write_text(path, json.dumps({"greedy": greedy, "cost": cost}) + "\n")
    values = json.loads(path.read_text(encoding="utf-8"))
    return values["greedy"], values["cost"]


def _run_baseline(benchmark: Benchmark, trial: Trial, suite: Suite, root: Path) -> None:
    folder = trial.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tuned.json"
    settings = suite.settings(UNSEEN)
    if not path.exists():
        with RolloutPool(suite.task, settings, 0) as pool:
            write_text(path, json.dumps(_tuned(benchmark, trial, suite, settings, pool)) + "\n")
    tuned = json.loads(path.read_text(encoding="utf-8"))

    def act(env: LayerwiseLREnv, instance: Instance, number: int) -> Episode:
        if trial.kind == "random":
            seed = derive_seed(EVALUATION_SEED, "benchmark", trial.method, number)
            return run_policy(env, RandomPolicy(env.action_space), instance, seed, False)
        controller: Controller
        if trial.kind == "search":
            controller = Static(tuple(tuned["vector"]))
        else:
            groups = len(env.trainer.layer_groups)
            controller = TUNED_RULES[trial.method](groups)[tuned["setting"]]
        return run_controller(env, controller, instance)

    for other in _missing(benchmark, folder):
        groups = len(task_of(other.task, other.settings()).layer_groups)
        results: list[TestResult] = []
        refused = ""
        if trial.kind == "search" and len(tuned["vector"]) != groups:
            refused = f"a vector of {len(tuned['vector'])} layer groups, {other.name} has {groups}"
        else:
            results = _judged(benchmark, other, other.settings(UNSEEN), act)
        setting = tuned["setting"]
        _write(benchmark, trial, root, other, tuned["cost"], setting, results, refused)
    _select(trial, root, suite, settings, act)


def _tuned(
    benchmark: Benchmark, trial: Trial, suite: Suite, settings: EnvSettings, pool: RolloutPool
) -> dict[str, Any]:
    """Choose a baseline's setting on train instances; return it and what it cost."""
    nothing = {"episodes": 0, "inner_steps": 0, "validation_images": 0}
    if trial.kind == "random":
        return {"setting": "", "cost": nothing}
    groups = len(pool.here.trainer.layer_groups)
    if trial.kind == "search":
        seed = derive_seed(EVALUATION_SEED, "search", benchmark.settings.seed + trial.index)
        budget = benchmark.settings.episodes
        found = search(pool, suite.task, settings.instances, settings.grid, groups, budget, seed)
        cost = {key: getattr(found, key) for key in nothing}
        return {"setting": found.setting, "vector": list(found.vector), "cost": cost}
    listed = tuning_set(suite.task, settings.instances, benchmark.settings.tuning_instances)
    best, scorer = tune(pool, TUNED_RULES[trial.method](groups), listed)
    return {"setting": best, "cost": {key: getattr(scorer, key) for key in nothing}}


def _write(
    benchmark: Benchmark,
    trial: Trial,
    root: Path,
    tested: Suite,
    cost: dict[str, int],
    setting: str,
    results: Sequence[TestResult],
    refused: str = "",
) -> None:
    """Write how a trial did on a suite: plain values that JSON can hold."""
    write_text(
        test_file(trial.folder(root), tested.name),
        json.dumps(
            {
                "suite": trial.suite,
                "suite_version": benchmark.suites[trial.suite].version,
                "tested_on": tested.name,
                "tested_version": tested.version,
                "metric": tested.settings().metric,
                "layer_groups": list(task_of(tested.task, tested.settings()).layer_groups),
                "method": trial.method,
                "kind": trial.kind,
                "training_seed": benchmark.settings.seed + trial.index,
                "setting": setting,
                "cost": cost,
                "refused": refused,
                "results": [episode_record(result) for result in results],
                "provenance": provenance(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        + "\n",
    )


def start_run_folder(benchmark: Benchmark, suite: str, agent: str, root: Path) -> None:
    """Make the run folder of an agent's trials, or see that it may have as many training seeds."""
    experiment, path = benchmark.experiment(suite, agent), root / suite / agent
    if not (path / "config.yaml").exists():
        RunFolder.start(path, experiment)
        return
    before = RunFolder.open(path).experiment
    if before.train.seeds < experiment.train.seeds:
        RunFolder(path, experiment).write_config()


def check_run_folder(benchmark: Benchmark, suite: str, agent: str, root: Path) -> None:
    """Find out whether an agent's trials may go into their folder.

    Raises:
        ConfigError: It holds trainings of other settings.
    """
    path = root / suite / agent
    if (path / "config.yaml").exists():
        there, here = RunFolder.open(path).experiment, benchmark.experiment(suite, agent)
        # How many seeds and tests there are makes no training another.
        if {**there.to_dict(), "train": None} != {**here.to_dict(), "train": None}:
            raise ConfigError(
                f"{path} holds trainings of agent {agent} with other settings; give the agent "
                "another name, or choose another --out"
            )
