"""How much a controller could gain over static rates: what knowledge and what dynamics are worth.

    python -m benchmarks.headroom --suite digits-mixed --out headroom.json

Every row is a search of the same kind and budget (successive halving, on train instances), judged
on the test instances of the suite. A row that *knows* something is told what no controller is told:
it says what finding it out could gain. The two rows *near it* search around the first row's vector:
`near it` moves its groups by a level or not at all, `near it, in thirds` does so in each third of
the training apart. Their difference is what changing rates over time is worth to such a search.

A search is kept in --out when it is done, and not repeated by the same command.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import Controller
from agents.benchmark.plan import Suite
from agents.benchmark.statistics import aggregate_iqm, iqm_difference
from agents.protocol import judge_controller
from agents.rollout import RolloutPool
from agents.run_folder import write_text
from agents.search import (
    LAST_RUNG,
    Scorer,
    candidates_within,
    successive_halving,
    train_instances,
)
from asg_env.actions import GRIDS
from asg_env.build import task_of
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.core.telemetry import Telemetry
from asg_env.core.trainer import Trainer
from asg_env.instances import Instance
from asg_env.validation import ConfigError

Vectors = Sequence[Sequence[float]]  # multipliers, of equal parts of the training x layer groups


@dataclass(frozen=True)
class Row:
    """What a search may use.

    Attributes:
        scale: It knows the hidden scale.
        optimizer: It knows the optimizer, and searches for each alone.
        near: It moves the vector of the first row.
        phases: Equal parts of the training that have rates of their own.
    """

    scale: bool = False
    optimizer: bool = False
    near: bool = False
    phases: int = 1


STATIC = "static"
ROWS = {
    STATIC: Row(),
    "knows the scale": Row(scale=True),
    "knows the optimizer": Row(optimizer=True),
    "knows both": Row(scale=True, optimizer=True),
    "near it": Row(near=True),
    "near it, in thirds": Row(near=True, phases=3),
}


@dataclass
class Told:
    """Sets rates by what it is told of the instance.

    Attributes:
        vectors: By optimizer, or under "" for all.
        scale: Divide by the hidden scale, up to a multiplier of 1.
    """

    vectors: Mapping[str, Vectors]
    scale: bool

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Read what it is told."""
        own = self.vectors.get("") or self.vectors[str(instance.optimizer)]
        factor = instance.base_lr_scale if self.scale else 1.0
        self._now = [[min(m / factor, 1.0) for m in vector] for vector in own]

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Return the multipliers of this part of the training."""
        return self._now[min(int(progress * len(self._now)), len(self._now) - 1)]


def search(
    name: str, suite: Suite, pool: RolloutPool, episodes: int, seed: int, start: Vectors
) -> Told:
    """Find the best candidate of a row on train instances.

    Args:
        name: Of the row.
        suite: Its train instances are searched on.
        pool: Of its environments.
        episodes: That the search may cost; twice, where it knows the optimizer.
        seed: Of candidates and instances.
        start: What the first row found; read by rows near it.
    """
    row, settings = ROWS[name], suite.settings()
    grid, groups = GRIDS[settings.grid], len(task_of(suite.task, settings).layer_groups)
    seed = derive_seed(seed, "headroom", suite.name)
    listed = train_instances(suite.task, settings.instances, seed, 4 * LAST_RUNG)
    count, rungs = candidates_within(episodes)
    generator = numpy_generator(seed, name)
    if row.near:
        moves = generator.integers(-1, 2, size=(count, row.phases, groups))
        moves[0] = 0
        levels = [[grid.index(m) for m in start[0]]] + moves
    else:
        levels = generator.integers(len(grid), size=(count, row.phases, groups))
    levels = np.clip(levels, 0, len(grid) - 1)
    vectors = [[[grid[i] for i in part] for part in one] for one in levels.tolist()]
    found = {}
    for optimizer in sorted({str(i.optimizer) for i in listed}) if row.optimizer else [""]:
        part = [i for i in listed if not optimizer or i.optimizer == optimizer]
        candidates: dict[str, Controller] = {str(v): Told({"": v}, row.scale) for v in vectors}
        best, _ = successive_halving(Scorer(pool, part), candidates, rungs)
        found[optimizer] = next(v for v in vectors if str(v) == best)
    return Told(found, row.scale)


def run(
    suite: Suite, episodes: int, seeds: int, tests: int, workers: int, out: Path
) -> dict[str, Any]:
    """Search and judge what --out does not hold yet; return all of it.

    Raises:
        ConfigError: --out is of another suite, version or budget.
    """
    head = {"suite": suite.name, "version": suite.version, "episodes": episodes, "tests": tests}
    settings, listed = suite.settings(), suite.tests(tests)
    varies = any(instance.optimizer for instance in listed)
    found: dict[str, Any] = {**head, "rows": {}}
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in head} != head:
            raise ConfigError(f"--out {out} is of another suite, version or budget; give another")
    with RolloutPool(suite.task, settings, workers) as pool:
        for seed in map(str, range(seeds)):
            for name, row in ROWS.items():
                done = found["rows"].setdefault(name, {}) if varies or not row.optimizer else None
                if done is None or seed in done:
                    continue
                start = found["rows"][STATIC][seed]["vectors"][""] if row.near else []
                best = search(name, suite, pool, episodes, int(seed), start)
                results = pool.map(judge_controller, [(best, instance) for instance in listed])
                scores = [result.score(settings.metric) for result in results]
                done[seed] = {"vectors": best.vectors, "scores": scores}
                write_text(out, json.dumps(found) + "\n")
                print(f"seed {seed}, {name}: {np.mean(scores):.3f}  {best.vectors}", flush=True)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The rows as Markdown: interquartile mean, and the difference from the first row."""
    lines = [
        "| search | test accuracy (IQM) | 95 % interval | minus static |",
        "|---|---:|---:|---:|",
    ]
    scores = {
        name: np.array([done[seed]["scores"] for seed in sorted(done, key=int)])
        for name, done in found["rows"].items()
    }
    for name, values in scores.items():
        stream = numpy_generator(0, "headroom", name)
        mean = aggregate_iqm(values, stream)
        gain = iqm_difference(values, scores[STATIC], stream)
        more = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        lines.append(
            f"| {name} | {mean.value:.3f} | {mean.low:.3f} to {mean.high:.3f} | "
            f"{more if name != STATIC else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, search, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="digits-mixed", help="of configs/env, or a path")
    parser.add_argument("--episodes", type=int, default=480, help="of each search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tests", type=int, default=40, help="test instances")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    suite = Suite.load(arguments.suite, {})
    try:
        found = run(
            suite,
            arguments.episodes,
            arguments.seeds,
            arguments.tests,
            arguments.workers,
            arguments.out,
        )
    except ConfigError as error:
        parser.error(str(error))
    print(table(found))


if __name__ == "__main__":
    main()
