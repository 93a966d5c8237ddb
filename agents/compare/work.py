"""`asg compare`, the work: every row tuned on train instances, then judged on test instances.

A row is written to the folder when it is done; a comparison that was killed goes on with the
first row that is not there.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.compare.plan import Method, Plan, Row, RowSettings, file_name
from agents.fit import fit
from agents.judgement import judge_network
from agents.rollout import WorkerPool
from agents.run_folder import write_text
from agents.search import train_instances
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.evaluation import Metric
from asg_env.core.guidance import TERMS, GuidanceError
from asg_env.core.optimizers import OneRateError
from asg_env.core.seeding import derive_seed
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance, published_test_instances
from asg_env.validation import ConfigError

COMPARISON_SEED = 0  # of the train instances that coefficients are tuned on
Report = Callable[[str, int], None]  # (row, trainings done since the last report)


class TrialRunner:
    """Trains networks in a worker process; the trainer is kept while its settings stay."""

    def __init__(self, task: str, processes: int) -> None:
        self.task, self._processes = task, processes
        self._settings: EnvSettings | None = None
        self._trainer: Trainer | None = None

    def trainer_for(self, settings: EnvSettings) -> Trainer:
        """Return the trainer of these settings, its guidance set."""
        # Guidance can be changed in place, which keeps what the teacher remembers.
        bare = settings.model_copy(update={"guidance": None, "kl_weight": None})
        if self._trainer is None or bare != self._settings:
            settings_only = bare.model_copy(update={"guidance": {}})
            self._trainer = build_trainer(self.task, settings_only, self._processes)
            self._settings = bare
        self._trainer.guide(settings.guidance_terms())
        return self._trainer


@dataclass(frozen=True)
class Training:
    """What one ordinary training did.

    Attributes:
        inner_steps: Taken, pilot runs included.
        seconds: Of training, in a worker with one thread.
        drifts: Relative distance of each layer group from where it started, (G,).
        diverged: Whether it diverged.
    """

    inner_steps: int
    seconds: float
    drifts: tuple[float, ...]
    diverged: bool


def train_once(
    runner: TrialRunner, method: Method, instance: Instance, seed: int
) -> tuple[Trainer, Training]:
    """Train one network by a method; sampled actions of a policy follow `seed`."""
    trainer = runner.trainer_for(method.settings)
    controller = method.controller(trainer)
    if method.policy is not None:
        method.policy.seed(seed)
    drifts: tuple[float, ...] = ()

    def remember(record: dict[str, Any]) -> None:
        nonlocal drifts
        drifts = record["drifts"]

    began = time.perf_counter()
    records = fit(trainer, controller, instance, method.settings.windows(), remember)
    seconds = time.perf_counter() - began
    extra = getattr(controller, "extra_inner_steps", 0)
    last = records[-1]
    return trainer, Training(last["inner_step"] + extra, seconds, drifts, last["diverged"])


def check_method(runner: TrialRunner, row: str, method: Method) -> None:
    """Try what a row may have named wrongly, before hours are spent; importances are not built.

    Raises:
        ConfigError: The rule or a guidance term cannot be built.
    """
    bare = method.settings.model_copy(update={"guidance": {}, "kl_weight": None})
    trainer = runner.trainer_for(bare)
    terms = method.settings.guidance_terms()
    trainer.reset(head_seed=0, data_seed=0)
    try:
        trainer.guide({n: t for n, t in terms.items() if t.options or t.build is not TERMS.get(n)})
        controller = method.controller(trainer)
        controller.begin(Instance(runner.task, head_seed=0, data_seed=0), trainer)
        trainer.run(1, controller.multipliers(0.0, None))
    except GuidanceError as error:
        raise ConfigError(f"`rows.{row}.guidance`: {error}; mend the file") from None
    except (ConfigError, OneRateError):
        raise
    except Exception as error:  # a user's code
        raise ConfigError(
            f"`rows.{row}.rule` must train; {method.rule} ends in {type(error).__name__}: {error}"
        ) from None


def tuning_trial(
    runner: TrialRunner, method: Method, instance: Instance, split: str, metric: Metric
) -> float:
    """Train, and return the figure of a validation split that the candidate is chosen by."""
    trainer, training = train_once(runner, method, instance, 0)
    return 0.0 if training.diverged else trainer.evaluate(split).score(metric)


def test_trial(
    runner: TrialRunner, method: Method, instance: Instance, seed: int
) -> dict[str, Any]:
    """Train, and judge the network on the test split; plain values that JSON can hold."""
    trainer, training = train_once(runner, method, instance, seed)
    judged = judge_network(trainer, training.diverged)
    return {
        "instance": instance.to_dict(),
        "correct": "".join("01"[int(c)] for c in judged.correct),
        "confusion": judged.confusion.tolist(),
        "calibration_error": judged.calibration_error,
        "energies": judged.energies,
        "retention": judged.retention,
        "inner_steps": training.inner_steps,
        "seconds": round(training.seconds, 3),
        "drifts": [d if np.isfinite(d) else None for d in training.drifts],
        "diverged": training.diverged,
    }


class Comparison:
    """A comparison in its folder."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        seeds: int,
        tuning: int,
        tune_on: str,
    ) -> None:
        """Prepare a comparison.

        Args:
            plan: The rows.
            folder: Where finished rows are kept.
            seeds: Test instances, the first so many of the published list of `fixed`.
            tuning: Train instances that each candidate is tried on.
            tune_on: Validation split that chooses: `outer_valid` (real) or `inner_valid`.
        """
        self.plan, self.folder = plan, folder
        self._tune_on = tune_on
        self.tested = published_test_instances(plan.task, "fixed")[:seeds]
        self._tuned = train_instances(
            plan.task, "fixed", derive_seed(COMPARISON_SEED, "compare"), tuning
        )

    def trainings(self) -> int:
        """Trainings that are still to be done; those of finished rows are not."""
        total = 0
        for wanted in self.plan.wanted.rows:
            candidates = max(map(len, wanted.tune.values()), default=1)
            tuning = candidates * len(self._tuned) if candidates > 1 else 0
            total += (tuning + len(self.tested)) * (not self._path(wanted.name).exists())
        for row in self.plan.controllers:
            total += len(row.seeds) * len(self.tested) * (not self._path(row.name).exists())
        return total

    def run(self, pool: WorkerPool, report: Report) -> list[dict[str, Any]]:
        """Run what is missing; return the finished rows in the order of the file.

        Raises:
            ConfigError: A row cannot be built, or a finished row's file is damaged.
        """
        any_rate = 1.0
        checks = [
            (row.name, next(iter(self.plan.row(row, any_rate).candidates.values())))
            for row in self.plan.wanted.rows
        ]
        list(pool.map(check_method, checks))
        done: dict[str, dict[str, Any]] = {}
        shared = any_rate
        for wanted in self.plan.ordered():
            done[wanted.name] = self._finished(wanted.name) or self._run_row(
                pool, wanted, shared, report
            )
            if wanted.share_rate:
                shared = done[wanted.name]["rate"]
        for row in self.plan.controllers:
            done[row.name] = self._finished(row.name) or self._test(pool, row, row.seeds, report)
        names = [row.name for row in self.plan.wanted.rows]
        names += [row.name for row in self.plan.controllers]
        return [done[name] for name in names]

    def _run_row(
        self, pool: WorkerPool, wanted: RowSettings, shared: float, report: Report
    ) -> dict[str, Any]:
        """Choose the row's candidate on train instances, then test that one."""
        row = self.plan.row(wanted, shared)
        scores: dict[str, float] = {}
        if len(row.candidates) > 1:
            metric = self.plan.env.metric
            jobs = [
                (method, instance, self._tune_on, metric)
                for method in row.candidates.values()
                for instance in self._tuned
            ]
            results = []
            for result in pool.map(tuning_trial, jobs):
                results.append(result)
                report(row.name, 1)
            means = np.array(results).reshape(len(row.candidates), -1).mean(axis=1)
            scores = dict(zip(row.candidates, means.tolist(), strict=True))
        best = max(row.candidates, key=lambda name: scores.get(name, 0.0))
        method = row.candidates[best]
        chosen = {"setting": best, "rate": method.rate, "tuning": scores}
        return self._test(pool, row, (method,), report, chosen)

    def _test(
        self,
        pool: WorkerPool,
        row: Row,
        methods: Sequence[Method],
        report: Report,
        chosen: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        jobs = [
            (method, instance, derive_seed(COMPARISON_SEED, row.name, index, number))
            for index, method in enumerate(methods)
            for number, instance in enumerate(self.tested)
        ]
        results = []
        for result in pool.map(test_trial, jobs):
            results.append(result)
            report(row.name, 1)
        count = len(self.tested)
        values = {
            "digest": self.digest(),
            "name": row.name,
            "paper": row.paper,
            "setting": row.reward,
            "rate": None,
            "tuning": {},
            "guidance": {n: t.weight for n, t in methods[0].settings.guidance_terms().items()},
            "controller": bool(row.seeds),
            "reads_real_labels": row.real_labels,
            **(chosen or {}),
            "results": [results[i : i + count] for i in range(0, len(results), count)],
        }
        write_text(self._path(row.name), json.dumps(values) + "\n")
        return values

    def digest(self) -> str:
        """What a finished row must have been made with to be taken over."""
        return f"{self.plan.digest()} {len(self.tested)} {len(self._tuned)} {self._tune_on}"

    def _path(self, name: str) -> Path:
        return self.folder / "rows" / f"{file_name(name)}.json"

    def _finished(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            digest = values["digest"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is no whole row; delete it") from None
        if digest != self.digest():
            raise ConfigError(
                f"{path} is a row of other settings; go on with those, or add --overwrite"
            )
        found: dict[str, Any] = values
        return found
