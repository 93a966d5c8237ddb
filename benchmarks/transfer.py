"""When does what was learned on one task help on another: as a schedule, and as a live controller?

    python -m benchmarks.transfer RUN --out transfer.json --figure transfer.png

RUN is the run folder of a coordinate-wise agent on ASG/Digits-v0. Each of its training seeds gives
a live controller, and a schedule: the mean of its multipliers over rollouts at the nominal rate.
Both are judged on published test instances of every target below, beside rules that are tuned on
train instances of the target itself. `schedule, rate tuned` may be scaled as a whole, by a factor
chosen like those rules' rates; `schedule` is used as it is, on layer groups at the same relative
depth where the target has others.

A row is kept in --out when it is done, and not repeated by the same command.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agents.baselines import FAMILIES, Controller
from agents.benchmark.plan import Suite
from agents.benchmark.statistics import aggregate_iqm, iqm_difference
from agents.controller_file import controller_of
from agents.export import export_schedule
from agents.figures import HIGHLIGHT, save_figure
from agents.fit import ScheduleController
from agents.protocol import judge_controller, judge_policy, tuning_set
from agents.result_files import read_json
from agents.rollout import RolloutPool
from agents.run_folder import RunFolder, write_text
from agents.search import tune
from agents.train import load_policy
from asg_env.build import prepare_variants, task_of
from asg_env.config import EnvSettings
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.instances import TEST_INSTANCES
from asg_env.regrouping import regroup, sources_by_depth
from asg_env.schedule import LearnedSchedule
from asg_env.schedulers import Course
from asg_env.validation import ConfigError

OTHER_DIGITS = {"classes": [0, 1, 2, 3, 4]}
# Target: file of configs/env, what is changed in it, and how many test instances are judged.
TARGETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "same digits": ("digits-fixed", {}, 20),
    "same digits, unknown rate": ("digits-unknown-scale", {}, 20),
    "other digits": ("digits-fixed", OTHER_DIGITS, 20),
    "other digits, unknown rate": ("digits-unknown-scale", OTHER_DIGITS, 20),
    "ImageNet network": ("imagenet-lite", {"instances": "fixed"}, 8),
    "ImageNet network, unknown rate": ("imagenet-lite", {}, 8),
}
RULES = ("uniform", "cosine")
LIVE, AS_IT_IS, SCALED = "live controller", "schedule", "schedule, rate tuned"
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
TUNING_INSTANCES = 4  # train instances of the target on which each candidate is tried


def scaled(schedule: LearnedSchedule, factor: float) -> LearnedSchedule:
    """The schedule with all multipliers times a factor."""
    rows = tuple(tuple(factor * m for m in row) for row in schedule.multipliers)
    return schedule.with_changes(multipliers=rows)


def schedules_of(run: RunFolder, seeds: int, workers: int) -> list[LearnedSchedule]:
    """One schedule for each training seed, of greedy rollouts at the nominal rate."""
    experiment = run.experiment
    with RolloutPool(experiment.task, experiment.env, workers) as pool:
        return [
            export_schedule(
                run, load_policy(run, seed), pool, deterministic=True, training_seed=seed
            )
            for seed in range(seeds)
        ]


class Target:
    """What is judged on one target.

    Args:
        name: Of TARGETS.
        run: The learned controllers'; its settings say what the live ones see and do.
        tests: Test instances, at most; None for as many as TARGETS says.
    """

    def __init__(self, name: str, run: RunFolder, tests: int | None) -> None:
        suite, changes, count = TARGETS[name]
        env = run.experiment.env
        seen = ("observation", "action", "grid", "start_multiplier")
        self.suite = Suite.load(suite, {**changes, **{key: getattr(env, key) for key in seen}})
        self.settings: EnvSettings = self.suite.settings()
        self.listed = self.suite.tests(count if tests is None else min(count, tests))
        prepare_variants(self.suite.task, self.settings, print)
        self.layer_groups = tuple(task_of(self.suite.task, self.settings).layer_groups)
        self.steps = sum(self.settings.windows())

    def tuned(self, pool: RolloutPool, candidates: dict[str, Controller]) -> str:
        """Name of the candidate that does best on train instances."""
        tuning = tuning_set(self.suite.task, self.settings.instances, TUNING_INSTANCES)
        return tune(pool, candidates, tuning)[0]

    def scores(self, pool: RolloutPool, controller: Controller) -> list[float]:
        """Score of a rule or a schedule on each test instance."""
        results = pool.map(judge_controller, [(controller, i) for i in self.listed])
        return [result.score(self.settings.metric) for result in results]

    def rule(self, pool: RolloutPool, family: str) -> tuple[str, list[float]]:
        """Tune a family of rules, and judge the best."""
        candidates = FAMILIES[family](len(self.layer_groups))
        best = self.tuned(pool, candidates)
        return best, self.scores(pool, candidates[best])

    def schedule(
        self, pool: RolloutPool, learned: LearnedSchedule, factors: tuple[float, ...]
    ) -> tuple[str, list[float]]:
        """Judge a schedule times the best of the factors."""
        patterns = {name: name for name in self.layer_groups}
        mine = regroup(learned, patterns, sources_by_depth(learned, self.layer_groups))
        candidates: dict[str, Controller] = {
            f"x {factor:g}": ScheduleController(Course(scaled(mine, factor), self.steps))
            for factor in factors
        }
        best = self.tuned(pool, candidates) if len(candidates) > 1 else next(iter(candidates))
        return best, self.scores(pool, candidates[best])

    def live(self, pool: RolloutPool, run: RunFolder, seed: int) -> tuple[str, list[float]]:
        """Judge the live controller of a training seed, at its likeliest actions."""
        policy = controller_of(run, seed, greedy=True).policy(self.layer_groups)
        jobs = [
            (policy, instance, derive_seed(0, "transfer", number), True)
            for number, instance in enumerate(self.listed)
        ]
        results = pool.map(judge_policy, jobs)
        return "greedy", [result.score(self.settings.metric) for result in results]


def measure(
    run: RunFolder, seeds: int, tests: int | None, workers: int, out: Path
) -> dict[str, Any]:
    """Judge what --out does not hold yet; return all of it.

    Raises:
        ConfigError: --out is damaged, or of other controllers; or these fit no other network.
    """
    experiment = run.experiment
    # As JSON has them: tuples are lists there.
    asked = {"seeds": seeds, "tests": tests, "targets": TARGETS, "factors": FACTORS}
    head = {
        "run": experiment.digest(),
        **json.loads(json.dumps(asked)),
        "tuned_on": TUNING_INSTANCES,
    }
    found: dict[str, Any] = {**head, "rows": {}}
    if out.exists():
        found = read_json(out, ("rows",), "give another --out")
        if {key: found.get(key) for key in head} != head:
            raise ConfigError(f"--out {out} is of other controllers or tests; give another")
    schedules = schedules_of(run, seeds, workers)
    for name in TARGETS:
        rows = found["rows"].setdefault(name, {})
        target = Target(name, run, tests)
        with RolloutPool(target.suite.task, target.settings, workers) as pool:
            work: list[tuple[str, int]] = [(rule, 0) for rule in RULES]
            work += [(row, seed) for seed in range(seeds) for row in (LIVE, AS_IT_IS, SCALED)]
            for row, seed in work:
                done = rows.setdefault(row, {"setting": [], "scores": []})
                if len(done["scores"]) > seed:
                    continue
                if row == LIVE:
                    setting, scores = target.live(pool, run, seed)
                elif row in RULES:
                    setting, scores = target.rule(pool, row)
                else:
                    factors = FACTORS if row == SCALED else (1.0,)
                    setting, scores = target.schedule(pool, schedules[seed], factors)
                done["setting"].append(setting)
                done["scores"].append(scores)
                write_text(out, json.dumps(found) + "\n")
                print(f"{name}, {row}, seed {seed}: {np.mean(scores):.3f} ({setting})", flush=True)
    return found


def differences(rows: Mapping[str, Any], name: str) -> dict[str, Any]:
    """IQM of every row of a target, and what it is above the best uniform rate."""
    uniform = np.array(rows["uniform"]["scores"])
    values = {}
    for row, done in rows.items():
        scores, stream = np.array(done["scores"]), numpy_generator(0, "transfer", name, row)
        gain = iqm_difference(scores, uniform, stream)
        settings = done["setting"] if len(set(done["setting"])) > 1 else done["setting"][:1]
        values[row] = (aggregate_iqm(scores, stream), gain, ", ".join(settings))
    return values


def table(found: Mapping[str, Any]) -> str:
    """Every target's rows as Markdown."""
    lines = []
    for name, rows in found["rows"].items():
        count = len(rows["uniform"]["scores"][0])
        lines += [
            f"\n**{name}** ({count} test instances)\n",
            "| | setting | test accuracy (IQM) | minus uniform |",
            "|---|---|---:|---:|",
        ]
        for row, (mean, gain, setting) in differences(rows, name).items():
            minus = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
            lines.append(
                f"| {row} | {setting} | {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) | "
                f"{minus if row != 'uniform' else ''} |"
            )
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw what each row is above the best uniform rate, a panel for each target."""
    targets = list(found["rows"])
    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2, -(-len(targets) // 2), squeeze=False, sharex=True, sharey=True
    ).T.flatten()
    for panel, name in zip(panels, targets, strict=False):
        values = differences(found["rows"][name], name)
        shown = [row for row in values if row != "uniform"][::-1]
        for place, row in enumerate(shown):
            gain = values[row][1]
            color = "#525252" if row in RULES else HIGHLIGHT
            panel.plot([gain.low, gain.high], [place, place], color=color, lw=2)
            panel.plot(gain.value, place, "o", color=color)
        panel.axvline(0, color="#a3a3a3", lw=1)
        panel.set_yticks(range(len(shown)), shown)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("test accuracy minus best uniform rate", fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Parse arguments, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder of a coordinate-wise agent")
    parser.add_argument("--seeds", type=int, help="training seeds; all of the run if left out")
    parser.add_argument("--tests", type=int, help="test instances of a target, at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # bits change with the thread count
    try:
        run = RunFolder.open(arguments.run)
        most = run.experiment.train.seeds
        seeds = most if arguments.seeds is None else arguments.seeds
        for name, value, bound in (
            ("seeds", seeds, most),
            ("tests", arguments.tests, TEST_INSTANCES),
        ):
            if value is not None and not 1 <= value <= bound:
                raise ConfigError(f"--{name} must be from 1 to {bound}, got {value}; set it so")
        found = measure(run, seeds, arguments.tests, arguments.workers, arguments.out)
    except ConfigError as error:
        parser.error(str(error))
    print(table(found))
    if arguments.figure:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
