"""Print the calibration table of `ASG/Digits-v0`: what fixed settings reach, and in what time.

    python benchmarks/calibrate_digits.py                   # on outer_valid, for choosing
    python benchmarks/calibrate_digits.py --split test      # once, after everything is frozen

Seeds 1000 and up: neither the environment's train instances nor its test instances.
"""

import argparse
import time

import numpy as np
import torch

from agents.baselines import frozen_backbone, small_backbone, uniform
from asg_env.config import EnvSettings
from asg_env.core.seeding import numpy_generator
from asg_env.core.trainer import Trainer
from asg_env.env import build_trainer

TASK = "ASG/Digits-v0"
FIRST_SEED = 1000
LEVELS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
GRID = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEARCH = {2: 81, 8: 27, 24: 5}  # seeds per candidate -> candidates at most


def run(trainer: Trainer, vector: tuple[float, ...], seed: int, split: str) -> tuple[float, float]:
    """Train once at a constant vector; return accuracy on `split` and retention, 0 if diverged."""
    settings = EnvSettings()
    trainer.reset(seed, seed + 500)
    for window in settings.windows():
        if trainer.run(window, vector).diverged:
            return 0.0, 0.0
    return trainer.evaluate(split).accuracy, trainer.evaluate("old_task").accuracy


def line(trainer: Trainer, name: str, vector: tuple[float, ...], seeds: range, split: str) -> None:
    """Print mean, standard error and retention of a vector over seeds."""
    results = np.array([run(trainer, vector, seed, split) for seed in seeds])
    error = results[:, 0].std(ddof=1) / len(seeds) ** 0.5
    print(
        f"| {name} | {results[:, 0].mean():.3f} ± {error:.3f} | {results[:, 1].mean():.3f} |",
        flush=True,
    )


def search(trainer: Trainer) -> tuple[float, ...]:
    """Best static vector of a random search, by outer_valid on seeds of its own."""
    generator = numpy_generator(0, "calibration-search")
    vectors = [tuple(GRID[i] for i in generator.integers(len(GRID), size=5)) for _ in range(81)]
    scores: dict[tuple[float, ...], list[float]] = {vector: [] for vector in vectors}
    alive = list(scores)
    for seeds, kept in SEARCH.items():
        alive = alive[:kept]
        for vector in alive:
            for seed in range(len(scores[vector]), seeds):
                scores[vector].append(run(trainer, vector, seed + 2000, "outer_valid")[0])
        alive.sort(key=lambda vector: -float(np.mean(scores[vector])))
    return alive[0]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("outer_valid", "test"), default="outer_valid")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    trainer = build_trainer(TASK, EnvSettings())
    groups = len(trainer.layer_groups)
    print(f"{arguments.split}, {arguments.seeds} seeds, torch {torch.__version__}, one thread\n")
    print("| setting | accuracy ± standard error | retention |\n|---|---:|---:|")
    for level in LEVELS:
        line(trainer, f"uniform {level:g}", uniform(level, groups).vector, seeds, arguments.split)
    for level in LEVELS[:4]:
        vector = small_backbone(level, groups).vector
        line(trainer, f"backbone {level / 10:g}, head {level:g}", vector, seeds, arguments.split)
    for level in LEVELS[:4]:
        vector = frozen_backbone(level, groups).vector
        line(trainer, f"frozen backbone, head {level:g}", vector, seeds, arguments.split)
    best = search(trainer)
    name = "best static vector of a search: " + ", ".join(f"{m:g}" for m in best)
    line(trainer, name, best, seeds, arguments.split)
    for weight in (0.0, 0.1, 1.0):
        other = build_trainer(TASK, EnvSettings(kl_weight=weight))
        for level in (0.1, 0.03, 0.01):
            line(
                other,
                f"KL weight {weight:g}, uniform {level:g}",
                uniform(level, groups).vector,
                seeds,
                arguments.split,
            )
    began = time.perf_counter()
    for seed in seeds:
        run(trainer, uniform(0.03, groups).vector, seed, "outer_valid")
    print(
        f"\n{(time.perf_counter() - began) / len(seeds):.2f} s an episode of 150 inner steps "
        "on one core"
    )


if __name__ == "__main__":
    main()
