"""Print the calibration table of `ASG/Digits-v0`: what fixed settings reach, and in what time.

    python -m benchmarks.calibrate_digits               # on outer_valid, for choosing
    python -m benchmarks.calibrate_digits --with-test   # once, after everything is frozen

Seeds 1000 and up: neither the environment's train instances nor its test instances.
"""

import argparse
import time

import numpy as np
import torch

from agents.baselines import LEVELS, frozen_backbone, small_backbone, uniform
from agents.judgement import test_network
from asg_env.actions import GRIDS
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.seeding import numpy_generator
from asg_env.core.trainer import Trainer

TASK = "ASG/Digits-v0"
FIRST_SEED, FIRST_SEARCH_SEED = 1000, 2000
RUNGS = {2: 81, 8: 27, 24: 5}  # seeds per candidate -> candidates at most
Vector = tuple[float, ...]


def train(trainer: Trainer, vector: Vector, seed: int) -> bool:
    """Train once at a constant vector; return whether it diverged."""
    trainer.reset(seed, seed + 500)
    return any(trainer.run(window, vector).diverged for window in EnvSettings().windows())


def line(trainer: Trainer, name: str, vector: Vector, seeds: range, with_test: bool) -> None:
    """Print the means of a vector over seeds, with standard errors; diverged runs count as 0."""
    results = np.zeros((len(seeds), 3))
    for row, seed in zip(results, seeds, strict=True):
        if not train(trainer, vector, seed):
            row[0] = trainer.evaluate("outer_valid").accuracy
            row[1] = test_network(trainer, False)[0].mean() if with_test else 0.0
            row[2] = trainer.evaluate("old_task").accuracy
    errors = results.std(axis=0, ddof=1) / len(seeds) ** 0.5
    cells = [f"{results[:, i].mean():.3f} ± {errors[i]:.3f}" for i in (0, 1)[: 1 + with_test]]
    print(f"| {name} | {' | '.join(cells)} | {results[:, 2].mean():.3f} |", flush=True)


def search(trainer: Trainer) -> Vector:
    """Best static vector of a random search, by outer_valid on seeds of its own."""
    generator = numpy_generator(0, "calibration-search")
    grid = GRIDS["log"]
    draws = generator.integers(len(grid), size=(max(RUNGS.values()), len(trainer.layer_groups)))
    scores: dict[Vector, list[float]] = {tuple(grid[i] for i in row): [] for row in draws.tolist()}
    alive = list(scores)
    for seeds, kept in RUNGS.items():
        alive = alive[:kept]
        for vector in alive:
            for seed in range(FIRST_SEARCH_SEED + len(scores[vector]), FIRST_SEARCH_SEED + seeds):
                diverged = train(trainer, vector, seed)
                accuracy = 0.0 if diverged else trainer.evaluate("outer_valid").accuracy
                scores[vector].append(accuracy)
        alive.sort(key=lambda vector: -float(np.mean(scores[vector])))
    return alive[0]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--with-test", action="store_true", help="score the test split, too")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    trainer = build_trainer(TASK, EnvSettings())
    groups = len(trainer.layer_groups)

    def show(name: str, vector: Vector, on: Trainer = trainer) -> None:
        line(on, name, vector, seeds, arguments.with_test)

    print(f"{arguments.seeds} seeds, torch {torch.__version__}, one thread\n")
    columns = ["setting", "outer_valid", *(["test"] * arguments.with_test), "retention"]
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for level in LEVELS:
        show(f"uniform {level:g}", uniform(level, groups).vector)
    for level in LEVELS[:4]:
        show(f"backbone {level / 10:g}, head {level:g}", small_backbone(level, groups).vector)
    for level in LEVELS[:4]:
        show(f"frozen backbone, head {level:g}", frozen_backbone(level, groups).vector)
    best = search(trainer)
    show("best static vector of a search: " + ", ".join(f"{m:g}" for m in best), best)
    for weight in (0.0, 0.1, 1.0):
        other = build_trainer(TASK, EnvSettings(kl_weight=weight))
        for level in (0.1, 0.03, 0.01):
            show(f"KL weight {weight:g}, uniform {level:g}", uniform(level, groups).vector, other)
    began = time.process_time()
    for seed in seeds:
        train(trainer, uniform(0.03, groups).vector, seed)
    seconds = (time.process_time() - began) / len(seeds)
    print(f"\n{seconds:.2f} CPU seconds a training of 150 inner steps")


if __name__ == "__main__":
    main()
