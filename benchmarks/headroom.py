"""How much a controller could gain over static rates: what knowledge and what dynamics are worth.

    python -m benchmarks.headroom --suite digits-mixed --out headroom.json

Every row is a search of the same kind (successive halving, on train instances) over as many
different candidates, judged on the test instances of the suite. A row that *knows* something is
told what no controller is told: it says what finding it out could gain. One that knows the
optimizer searches for each alone, with half of the budget. The two rows *near it* go on from the
first row's vector, so they cost a search more: `near it` moves its groups by up to two levels,
`near it, in thirds` does so in each third of the training apart. Their difference is what changing
rates over time is worth to such a search. `by update ratio` is told nothing and reads what an
agent may read: it searches for the update-to-weight ratio that each group is to have, and a
feedback rule moves the multipliers there. Its difference from static rates is what the simplest
adaptive controller gains.

A search is kept in --out when it is done, and not repeated by the same command.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.baselines import Controller
from agents.benchmark.plan import Suite
from agents.benchmark.statistics import aggregate_iqm, iqm_difference
from agents.protocol import judge_controller
from agents.result_files import read_json
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
from asg_env.instances import TEST_INSTANCES, Instance
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
        ratios: It searches for update ratios in the place of multipliers.
    """

    scale: bool = False
    optimizer: bool = False
    near: bool = False
    phases: int = 1
    ratios: bool = False


STATIC = "static"
NEAR = 2  # levels
RATIOS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # update over weight, of a window; as the grid
ROWS = {
    STATIC: Row(),
    "knows the scale": Row(scale=True),
    "knows the optimizer": Row(optimizer=True),
    "knows both": Row(scale=True, optimizer=True),
    "near it": Row(near=True),
    "near it, in thirds": Row(near=True, phases=3),
    "by update ratio": Row(ratios=True),
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


@dataclass
class Following:
    """Moves every group's multiplier until a window's update has a given share of the weights.

    At most one level of the grid a window, as an agent with relative actions; it stays where the
    ratio is within a factor of 1.8 of the one wanted.

    Attributes:
        vectors: Under "", in one part: the ratio of each group; 0 freezes it.
        grid: Levels of the multipliers.
        start: Where they begin, a level.
    """

    vectors: Mapping[str, Vectors]
    grid: Sequence[float]
    start: float

    def begin(self, instance: Instance, trainer: Trainer) -> None:
        """Start where an agent does."""
        (self._wanted,) = self.vectors[""]
        self._levels = [self.grid.index(self.start)] * len(self._wanted)

    def multipliers(self, progress: float, telemetry: Telemetry | None) -> Sequence[float]:
        """Move by what the last window's update was."""
        ratios = telemetry.update_ratios if telemetry else ()
        for group, ratio in enumerate(ratios):
            level = self._levels[group] + self._move(self._wanted[group], ratio)
            self._levels[group] = max(0, min(level, len(self.grid) - 1))
        return [self.grid[level] for level in self._levels]

    @staticmethod
    def _move(wanted: float, ratio: float) -> int:
        if not wanted or not ratio:
            return 1 if wanted else -1
        return max(-1, min(round(2 * math.log10(wanted / ratio)), 1))  # a level: half a decade


def search(
    name: str, suite: Suite, pool: RolloutPool, episodes: int, seed: int, start: Vectors
) -> Told | Following:
    """Find the best candidate of a row on train instances.

    Args:
        name: Of the row.
        suite: Its train instances are searched on.
        pool: Of its environments.
        episodes: That the search may cost.
        seed: Of candidates and instances.
        start: What the first row found; read by rows near it.

    Raises:
        ConfigError: The budget is too low for a candidate, or too high.
    """
    row, settings = ROWS[name], suite.settings()
    grid, groups = GRIDS[settings.grid], len(task_of(suite.task, settings).layer_groups)
    seed = derive_seed(seed, "headroom", suite.name)
    listed = train_instances(suite.task, settings.instances, seed, 4 * LAST_RUNG)
    told = sorted({str(i.optimizer) for i in listed}) if row.optimizer else [""]
    count, rungs = candidates_within(episodes // len(told))
    generator = numpy_generator(seed, name)
    if count > (NEAR + 1) ** groups:  # of a vector in a corner of the grid
        raise ConfigError(f"--episodes must be lower to have as many neighbours, got {episodes}")
    vectors: dict[str, Vectors] = {}
    while len(vectors) < count:
        if row.near:
            moves = generator.integers(-NEAR, NEAR + 1, size=(row.phases, groups))
            levels = [grid.index(m) for m in start[0]] + moves * bool(vectors)  # first: as it is
            levels = np.clip(levels, 0, len(grid) - 1)
        else:
            levels = generator.integers(len(grid), size=(row.phases, groups))
        meaning = RATIOS if row.ratios else grid
        vector = [[meaning[i] for i in part] for part in levels.tolist()]
        vectors[str(vector)] = vector

    def controller(found: Mapping[str, Vectors]) -> Told | Following:
        if row.ratios:
            return Following(found, grid, settings.start_multiplier)
        return Told(found, row.scale)

    found = {}
    for optimizer in told:
        part = [i for i in listed if not optimizer or i.optimizer == optimizer]
        candidates: dict[str, Controller] = {
            key: controller({"": vector}) for key, vector in vectors.items()
        }
        best, _ = successive_halving(Scorer(pool, part), candidates, rungs)
        found[optimizer] = vectors[best]
    return controller(found)


def run(
    suite: Suite, episodes: int, seeds: int, tests: int, workers: int, out: Path
) -> dict[str, Any]:
    """Search and judge what --out does not hold yet; return all of it.

    Raises:
        ConfigError: --out is damaged, or of another suite, version or budget.
    """
    head = {"suite": suite.name, "version": suite.version, "episodes": episodes, "tests": tests}
    settings, listed = suite.settings(), suite.tests(tests)
    # Of `transfer` only test instances have another optimizer, for which nothing can be searched.
    varies = train_instances(suite.task, settings.instances, 0, 1)[0].optimizer is not None
    found: dict[str, Any] = {**head, "rows": {}}
    if out.exists():
        found = read_json(out, ("rows",), "give another --out")
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
    for name, bound in (("seeds", math.inf), ("tests", TEST_INSTANCES)):
        value = getattr(arguments, name)
        if not 1 <= value <= bound:
            parser.error(f"--{name} must be from 1 to {bound}, got {value}; set it so")
    torch.set_num_threads(1)  # bits change with the thread count
    try:
        found = run(
            Suite.load(arguments.suite, {}),
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
