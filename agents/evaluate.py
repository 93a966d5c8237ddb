"""The evaluation protocol: controllers and baselines on the published test instances.

Everything that is tuned or searched is chosen on outer_valid of *train* instances before any test
image is looked at.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import FAMILIES, Controller, KnownScale, Static
from agents.experiment import Experiment
from agents.policy import Policy, RandomPolicy
from agents.protocol import (
    CONTROLLER_ROWS,
    EVALUATION_SEED,
    MODE_INSTANCES,
    TestResult,
    acts_greedily,
    check_same_problem,
    choose_mode,
    judge_controller,
    judge_policy,
    reads_real_labels,
    reward_in_words,
    tuning_set,
)
from agents.rollout import RolloutPool
from agents.run_folder import RunFolder, is_imported, training_cost
from agents.search import (
    Scorer,
    SearchResult,
    search,
    tune,
)
from asg_env.actions import ACTIONS
from asg_env.core.evaluation import Metric
from asg_env.core.seeding import derive_seed
from asg_env.instances import Instance, published_test_instances
from asg_env.validation import ConfigError


@dataclass
class Row:
    """One line of the results: a method on all test instances, for each of its seeds.

    Attributes:
        name: Method.
        setting: What tuning chose, for people.
        results: Per seed, per instance.
        tuning_episodes: Training runs spent on choosing it or training it, per seed.
        tuning_inner_steps: Inner steps spent so, per seed.
        tuning_images: Validation images evaluated while doing so, per seed.
        reference: Knows what no controller knows.
    """

    name: str
    setting: str
    results: list[list[TestResult]]
    tuning_episodes: int = 0
    tuning_inner_steps: int = 0
    tuning_images: int = 0
    reference: bool = False

    def correct(self) -> np.ndarray:
        """Bool, shape (S, I, N), where all instances are tested on the same images."""
        return np.stack([[r.correct for r in row] for row in self.results])

    def scores(self, metric: Metric) -> np.ndarray:
        """Figure of each network, shape (S, I)."""
        return np.array([[r.score(metric) for r in row] for row in self.results])


class Evaluation:
    """Runs the protocol for one run folder."""

    def __init__(
        self,
        run: RunFolder,
        pool: RolloutPool,
        groups: int,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._run, self._pool, self._groups, self._report = run, pool, groups, report
        self._experiment: Experiment = run.experiment

    def rows(self, policies: Sequence[Policy], random: RandomPolicy, count: int) -> list[Row]:
        """Judge the controller (one policy per training seed) and every baseline.

        Args:
            policies: Trained policies, one per training seed.
            random: The random policy.
            count: Test instances, the first so many of the published list.
        """
        experiment = self._experiment
        listed = published_test_instances(experiment.task, experiment.env.instances)[:count]
        spent = training_cost(self._run.seed_folder(0))
        modes, choosing = self._better_first(policies)
        spent = {key: spent[key] + choosing.get(key, 0) for key in spent}
        rows = [
            self._policy_row(CONTROLLER_ROWS[greedy], policies, listed, greedy, spent)
            for greedy in modes
        ]
        rows += self._search_rows(listed)
        for family, candidates in FAMILIES.items():
            rows.append(self._tuned_row(family, candidates(self._groups), listed))
        rows.append(self._policy_row("random policy", [random], listed, False, {}))
        return rows

    def _better_first(self, policies: Sequence[Policy]) -> tuple[tuple[bool, bool], dict[str, int]]:
        """Whether greedy or sampled actions do better on train instances, the better first.

        The first row is what differences are taken from, so this is settled before any test
        image is looked at. With a reward that reads no real label greedy comes first unseen, or
        for an imported policy of the original, which drew its actions, sampled.

        Returns:
            The two values of `deterministic`, and what choosing cost per training seed.
        """
        experiment = self._experiment
        if not reads_real_labels(experiment):
            return ((False, True) if is_imported(self._run) else (True, False)), {}
        self._report("greedy or sampled actions, on train instances")
        listed = tuning_set(experiment.task, experiment.env.instances, MODE_INSTANCES)
        greedy, cost = choose_mode(self._pool, policies, listed)
        return ((True, False) if greedy else (False, True)), cost

    def row_beside(self, policies: Sequence[Policy], greedy: bool, count: int) -> Row:
        """Judge this run's controller for the table of another run."""
        experiment = self._experiment
        listed = published_test_instances(experiment.task, experiment.env.instances)[:count]
        mode = "greedy" if greedy else "sampled"
        name = f"{self._run.path.name} ({Path(experiment.agent.kind).name}, {mode})"
        setting = "reward " + reward_in_words(experiment)
        return self._policy_row(
            name, policies, listed, greedy, training_cost(self._run.seed_folder(0)), setting
        )

    def _policy_row(
        self,
        name: str,
        policies: Sequence[Policy],
        listed: Sequence[Instance],
        deterministic: bool,
        spent: dict[str, int],
        setting: str = "",
    ) -> Row:
        self._report(name)
        stream = CONTROLLER_ROWS[deterministic]  # of sampled actions, whatever the row is called
        jobs = [
            (policy, instance, derive_seed(EVALUATION_SEED, stream, seed, index), deterministic)
            for seed, policy in enumerate(policies)
            for index, instance in enumerate(listed)
        ]
        results = list(self._pool.map(judge_policy, jobs))
        return Row(
            name,
            setting,
            _by_seed(results, len(listed)),
            spent.get("episodes", 0),
            spent.get("inner_steps", 0),
            spent.get("validation_images", 0),
        )

    def _controller_row(
        self,
        name: str,
        setting: str,
        controllers: Sequence[Controller],
        listed: Sequence[Instance],
        cost: SearchResult | Scorer,
        reference: bool = False,
    ) -> Row:
        jobs = [(controller, instance) for controller in controllers for instance in listed]
        results = list(self._pool.map(judge_controller, jobs))
        return Row(
            name,
            setting,
            _by_seed(results, len(listed)),
            cost.episodes,
            cost.inner_steps,
            cost.validation_images,
            reference,
        )

    def _tuned_row(
        self, family: str, candidates: dict[str, Controller], listed: Sequence[Instance]
    ) -> Row:
        """Choose a family's candidate on train instances, then test that one."""
        self._report(family)
        experiment = self._experiment
        count = experiment.train.tuning_instances
        tuning = tuning_set(experiment.task, experiment.env.instances, count)
        best, scorer = tune(self._pool, candidates, tuning)
        return self._controller_row(family, best, [candidates[best]], listed, scorer)

    def _search_rows(self, listed: Sequence[Instance]) -> list[Row]:
        """The equal-budget static search, one per training seed, and the scale-aware lines."""
        experiment = self._experiment
        if experiment.search_episodes == 0:
            return []
        found = [
            self._search(experiment.env.instances, index, f"seed-{index}/search.json")
            for index in range(experiment.train.seeds)
        ]
        rows = [
            self._controller_row(
                "static search",
                "; ".join(one.setting for one in found),
                [Static(f.vector) for f in found],
                listed,
                found[0],
            )
        ]
        # What a hidden scale is worth can be told where it is the only thing that varies.
        if experiment.env.instances != "unknown-scale" or not experiment.train.reference:
            return rows
        known = self._search("fixed", 0, "known_scale.json")
        rows += [
            self._controller_row(
                f"static, scale known ({label})",
                known.setting,
                [KnownScale(known.vector, clip)],
                listed,
                known,
                reference=True,
            )
            for label, clip in (("clipped", True), ("unclipped", False))
        ]
        return rows

    def _search(self, instances: Any, index: int, file: str) -> SearchResult:
        """Search once and keep the result in the run folder."""
        path = self._run.path / file
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                return SearchResult(**{**stored, "vector": tuple(stored["vector"])})
            except (ValueError, TypeError, KeyError):
                raise ConfigError(f"{path} is no whole search result; delete it") from None
        experiment = self._experiment
        budget = experiment.search_episodes
        self._report(f"static search over {budget} episodes ({file})")
        seed = derive_seed(EVALUATION_SEED, "search", instances, experiment.seed + index)
        grid = experiment.env.grid
        result = search(self._pool, experiment.task, instances, grid, self._groups, budget, seed)
        self._run.write_json(file, result.__dict__)
        return result


def compare(
    run: RunFolder,
    policies: Sequence[Policy],
    beside: Sequence[tuple[RunFolder, Sequence[Policy]]],
    count: int,
    workers: int,
    report: Callable[[str], None],
) -> list[Row]:
    """Judge a run's controller, every baseline, and the controllers of other runs.

    Args:
        run: The run; its controller's row comes first.
        policies: Its policies, one per training seed.
        beside: Other runs on the same task and instance set, with their policies.
        count: Test instances.
        workers: Worker processes.
        report: Called with what is being judged.

    Raises:
        ConfigError: Another run is on another task or instance set, or has another number of
            training seeds, so that no differences can be taken; or it cannot run here.
    """
    experiment = run.experiment
    if experiment.test_labels is None:
        raise ConfigError(
            f"{run.path} is on a target domain without labels, so there is nothing to judge "
            "controllers by; use it with asg export and asg fit"
        )
    modes = []
    for other, _ in beside:  # all that can be refused is, before anything is run
        theirs, ours = other.experiment, experiment
        if (theirs.task, theirs.env.instances) != (ours.task, ours.env.instances):
            raise ConfigError(
                f"--beside {other.path} is on {theirs.task}, {theirs.env.instances}, this run on "
                f"{ours.task}, {ours.env.instances}; compare runs on the same instances"
            )
        check_same_problem(f"--beside {other.path}", theirs.env, ours.env)
        if theirs.train.seeds not in (1, ours.train.seeds):
            raise ConfigError(
                f"--beside {other.path} has {theirs.train.seeds} training seeds, this run has "
                f"{ours.train.seeds}; compare runs of as many seeds"
            )
        theirs.check()
        modes.append(acts_greedily(other))
    groups = len(experiment.layer_groups)
    space = ACTIONS[experiment.env.action](experiment.env.grid, groups).space
    with RolloutPool(experiment.task, experiment.env, workers) as pool:
        rows = Evaluation(run, pool, groups, report).rows(policies, RandomPolicy(space), count)
    for (other, others), greedy in zip(beside, modes, strict=True):
        with RolloutPool(experiment.task, other.experiment.env, workers) as pool:
            rows.append(Evaluation(other, pool, groups, report).row_beside(others, greedy, count))
    return rows


def _by_seed(results: list[TestResult], count: int) -> list[list[TestResult]]:
    return [results[i : i + count] for i in range(0, len(results), count)]
